"""What the papers with a student and its averaged teacher share."""
