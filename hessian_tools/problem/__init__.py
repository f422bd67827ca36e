"""What is studied: a model, a loss and data. First ``problem``; then networks and data that come with the package."""
