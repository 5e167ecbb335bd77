"""Process-driven generation: a picture grows in cycles of plan, sketch, inspect and refine (arXiv 2604.04746)."""
