"""Models and data sets from the Hugging Face Hub."""
