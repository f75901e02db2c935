"""What a task's network is made of, what it must be, and how it is kept and rolled back."""
