import numpy as np

from alignkd.data.sample_task.digits import (
    DIGIT_SIDE,
    IMAGE_SIDE,
    SCALE,
    draw_grid,
    load_digit_sets,
    to_image,
)


def test_no_digit_image_is_in_both_splits():
    train, test = load_digit_sets(seed=3)
    train_images = {image.tobytes() for image in train.pixels}
    test_images = {image.tobytes() for image in test.pixels}
    assert len(train.labels) + len(test.labels) == 1797
    assert not train_images & test_images


def test_every_digit_has_the_same_share_in_both_splits():
    train, test = load_digit_sets(seed=0)
    shares = np.bincount(test.labels, minlength=10) / (
        np.bincount(train.labels, minlength=10) + np.bincount(test.labels, minlength=10)
    )
    assert shares.min() > 0.24
    assert shares.max() < 0.26


def test_seed_chooses_the_split():
    first, again, other = load_digit_sets(1), load_digit_sets(1), load_digit_sets(2)
    assert np.array_equal(first[1].pixels, again[1].pixels)
    assert not np.array_equal(first[1].labels, other[1].labels)


def test_grid_shows_its_digits_in_reading_order():
    train, _ = load_digit_sets(0)
    known = {image.tobytes(): int(label) for image, label in zip(train.pixels, train.labels, strict=True)}
    random = np.random.default_rng(5)
    for _ in range(20):
        grid = draw_grid(train, random)
        assert grid.pixels.shape == (IMAGE_SIDE, IMAGE_SIDE)
        small = grid.pixels[::SCALE, ::SCALE]
        cells = [
            small[row : row + DIGIT_SIDE, column : column + DIGIT_SIDE]
            for row in (0, DIGIT_SIDE)
            for column in (0, DIGIT_SIDE)
        ]
        assert tuple(known[np.ascontiguousarray(cell).tobytes()] for cell in cells) == grid.digits


def test_image_is_black_on_white():
    train, _ = load_digit_sets(0)
    grid = draw_grid(train, np.random.default_rng(0))
    image = np.asarray(to_image(grid))
    assert image[grid.pixels == 0].min() == 255
    assert image[grid.pixels == 255].max() == 0
