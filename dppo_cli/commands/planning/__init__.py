"""What `dppo plan` is made of: the model's shapes, a recorder of memory and work, cards, and estimates from them."""
