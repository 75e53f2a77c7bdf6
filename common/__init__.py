"""What every room may use: errors for people, units, estimates, files, progress."""
