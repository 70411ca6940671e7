"""What `cache_latents.py` and `train_lora.py` are made of. Read in this order:

    buckets     which resolution an image is trained at
    cache       the files between the two scripts
    families    what differs between SDXL and Flux
    objectives  noise in, target out
    data        the order of the batches
    settings    every option, and what can be wrong with them
    preparing   everything but the weights looked at, before anything is compiled
    memory      what the run will hold on the card
    sampling    pictures while it trains
    reporting   progress bar and TensorBoard
"""
