"""A unified model: one decoder that writes text and draws by flow matching, trained on whole processes."""
