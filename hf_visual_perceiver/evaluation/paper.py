"""The paper's published numbers, for comparison with our measurements.

Dancette & Cord, *Dynamic Query Selection for Fast Visual Perceiver*, CVPR Workshops 2022 (hal-03945064). Accuracies are
on CIFAR-10's test images, in percent.
"""

CITATION = (
    "Dancette & Cord, Dynamic Query Selection for Fast Visual Perceiver, CVPR 2022 Transformers for Vision Workshop"
)

# Table 1: cost of one image, in millions. The paper says FLOP, but its numbers are multiply-accumulates.
MACS_M: dict[int, float] = {1: 11, 2: 17, 4: 29, 8: 52, 16: 99, 32: 195, 48: 293, 64: 394}

# Table 1: inference time of a batch of 512 images, and relative to 64 queries; the hardware is not named.
MILLISECONDS_PER_512: dict[int, float] = {
    1: 38.34,
    2: 47.81,
    4: 57.68,
    8: 91.45,
    16: 169.77,
    32: 330.74,
    48: 512.62,
    64: 712.08,
}
RELATIVE_TIME: dict[int, float] = {1: 0.05, 2: 0.06, 4: 0.08, 8: 0.12, 16: 0.23, 32: 0.46, 48: 0.72, 64: 1.00}

# Tables 1 and 2: one network, trained with Query Masking.
QUERY_MASKING: dict[int, float] = {1: 40.29, 2: 49.89, 4: 64.00, 8: 77.13, 16: 85.91, 32: 90.52, 48: 91.78, 64: 92.58}

# Table 2: "Retrained", one network per number of queries.
SPECIALISTS: dict[int, float] = {1: 46.78, 2: 57.63, 4: 66.23, 8: 71.63, 16: 84.64, 32: 92.56, 48: 94.46, 64: 95.87}

# Table 2: "Q=64", trained with all 64 queries and evaluated with random ones, mean of 5 runs.
RANDOM_SUBSETS: dict[int, float] = {1: 12.51, 2: 14.36, 4: 17.87, 8: 29.47, 16: 59.01, 32: 87.28, 48: 93.84, 64: 96.05}

# Table 3: threshold to (average queries, accuracy).
SELECTION: dict[float, tuple[float, float]] = {
    0.6: (18.92, 87.01),
    0.65: (22.51, 88.94),
    0.7: (26.13, 90.00),
    0.8: (33.27, 91.53),
    0.9: (40.62, 92.10),
    0.99: (48.77, 92.40),
}

# Section 3: the network and its training.
PARAMETERS_M = 6.18
TRAINING_IMAGES = 350_000 * 512  # steps times batch

# Section 3.1: "we run the evaluation 5 times, with each time K random tokens".
RANDOM_DRAWS = 5

# Tables 1 to 3.
QUERIES = (1, 2, 4, 8, 16, 32, 48, 64)
THRESHOLDS = (0.6, 0.65, 0.7, 0.8, 0.9, 0.99)
