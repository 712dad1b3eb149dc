"""Files that this package writes beside others: images and anchors, and the store they are in."""
