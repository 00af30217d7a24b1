"""The datasets by name and what is known of each before it is read. Loads no torch."""

# Classes, training and test images of the sets that have a fixed number, for what is said of them
# without their data.
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "digits": 10, "imagenet": 1000}
NUM_IMAGES = {
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (604_388, 26_032),
    "imagenet": (1_281_167, 50_000),
    "digits": (1_437, 360),
}
SYNTHETIC_CLASSES = 10
