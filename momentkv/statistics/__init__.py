"""What stands for evicted tokens: moments, summaries, how far tokens reach, and the corrections made of them."""
