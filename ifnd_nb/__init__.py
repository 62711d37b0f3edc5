"""From unlabelled images you get an encoder whose features know what the images show. Contrastive learning gets there by telling every image from every other, and so also pushes apart images that mean the same thing: *false negatives*. This package teaches that method from the ground up in notebooks that run on a laptop, and the same notebooks are a fastai library that trains on your folder of images."""

__version__ = "0.0.1"
