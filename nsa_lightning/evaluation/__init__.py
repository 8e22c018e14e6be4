"""What a model can do: tasks with known answers, the loop that asks them, tables and pictures of the results."""
