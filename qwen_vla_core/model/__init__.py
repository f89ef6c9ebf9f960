"""The network: a Qwen vision-language backbone, a flow-matching action decoder, and the checkpoint with both."""
