"""Files that this package writes: images, anchors, aligned files, and the store they are in."""
