"""Lists, images, transforms and loaders."""
