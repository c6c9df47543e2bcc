"""What the chapters of the book use beside the method: figures, sliders, quizzes, and the recorded results."""
