"""What serving stacks take, one file each."""
