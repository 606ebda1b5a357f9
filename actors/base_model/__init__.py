"""The shipped base model and the script that pretrains it."""
