"""What the lessons compute beside the library, and the checks of their exercises."""
