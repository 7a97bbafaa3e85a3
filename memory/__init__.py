"""What is remembered between tasks."""
