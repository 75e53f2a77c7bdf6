"""What is on screen at one time, one screen a file."""
