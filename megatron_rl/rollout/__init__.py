"""Rollouts: engines that answer prompts with the actor's weights, and the way weights reach them."""
