"""One YAML per experiment; the comment at its head says the command, the expected time and the expected metric."""
