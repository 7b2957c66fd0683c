"""Programs that a model wrote, run behind the kernel's walls: `client` asks, `jail` runs, `walls` are what holds."""
