"""What the models, the loaders and the pictures agree on about images."""

from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

ImageSize = int | tuple[int, int]  # pixels: of a square, or (height, width)

MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
CROP_RATIO = DEFAULT_CROP_PCT  # of an image's short side, shown at evaluation
SMALL_IMAGE = 32  # DeiT's rule for CIFAR: images up to this size are shown whole, not cropped
