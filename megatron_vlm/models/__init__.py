"""What is computed: the encoder, the adapter, the decoder, and the two joined."""
