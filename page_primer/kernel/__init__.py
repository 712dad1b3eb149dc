"""What the kernel says of itself and of this process."""
