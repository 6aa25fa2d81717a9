"""From a labelled image data set to batches.

`datasets` is the table of known data sets, `load` reads one (`hub`, `lists`) and selects its long tail (`longtail`) as
an `image_set`, `augment` transforms images, and `loaders` batch them. Import the module you need.
"""
