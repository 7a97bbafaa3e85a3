"""What a test-time stream is made of: its domains, the order of its samples, what is absent from them, and how they are served."""
