"""Real servers on this machine's loopback address, as processes that can be killed."""
