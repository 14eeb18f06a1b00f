"""`--workers N`: several processes on one port, their parent, and what they tell each other."""
