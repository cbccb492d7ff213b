"""What the Triton backends of all operations share."""
