"""Records, how often each is used, and the stream of prompts a run consumes."""
