"""What a network is: components, surgery, storage, probe."""
