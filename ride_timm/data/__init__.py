"""From a labelled image data set to batches: `sources` -> `longtail` -> `transforms` -> `loader`.

`sources` reads a data set and lets `longtail` choose its rows from the labels alone; `transforms` holds the
augmentations, and `reduced_decode` spares them most of a large JPEG; `orders` says who sees which image when; `loader`
decodes, augments and batches. Import the module you need: nothing is imported here.
"""
