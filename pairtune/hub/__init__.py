"""What goes over the network: models and data sets from the Hugging Face Hub, and endpoints that are asked."""
