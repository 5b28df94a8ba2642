"""Views: colours and crops against torchvision, image by image; files; shares of processes.

The functions are msn.py's; the other scripts have the same code (test_copies.py)."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import each_script
from test_devices import MORE, VIEWS
from torchvision.transforms.v2 import functional as TF

import data2vec
import mae
import msn
import sampler
import simclr

# Numbers up to 1 that pass through some ten float32 operations, each off by 2^-24 of its result, or
# through two sums of 13 taps, are within 30 x 2^-24 = 2e-6, and the two sides within twice that.
ATOL = 4e-6


def assert_images(mine, theirs, atol=ATOL):
    torch.testing.assert_close(mine, torch.stack(list(theirs)), rtol=0, atol=atol)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(size=16):
    """Random images in [0, 1], and those at which formulas for hue and saturation divide by 0."""
    x = torch.zeros(17, 3, size, size)
    x[:6] = rand(6, 3, size, size)
    x[6:8] = rand(2, 1, size, size, seed=1)  # grey, of many levels
    x[9] = 1  # 8 is black, 9 white
    for i, corner in enumerate([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]):
        x[10 + i] = torch.tensor(corner).view(3, 1, 1)
    x[16] = (rand(3, size, size, seed=2) * 2).floor()  # only corners of the colour cube
    return x


# ---- 1. Colours

ADJUSTMENTS = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]


def changed_by_torchvision(image, kind, shift):
    return ADJUSTMENTS[kind](image, shift if kind == 3 else max(1 + shift, 0))


@pytest.mark.parametrize("kind", range(4))
def test_a_jitter_equals_torchvisions(kind):
    """From the lowest to the highest amount that torchvision takes; 0 changes nothing."""
    x = pictures()
    limit = 0.5 if kind == 3 else 1.0
    for step in range(-4, 5):
        shifts = torch.zeros(len(x), 4)
        shifts[:, kind] = limit * (2 * rand(len(x), seed=step + 4) - 1)
        shifts[::2, kind] = limit * step / 4
        theirs = [changed_by_torchvision(i, kind, s[kind].item()) for i, s in zip(x, shifts)]
        assert_images(msn.jitter_colours(x, shifts, [kind]), theirs)
    assert_images(msn.jitter_colours(x, torch.zeros(len(x), 4), [kind]), x)


@pytest.mark.parametrize("radius", [1, 3, 6])
def test_gaussian_blur_equals_torchvision(radius):
    x = pictures()
    sigma = 0.1 + 2 * rand(len(x))
    size = 2 * radius + 1
    theirs = [TF.gaussian_blur(i, [size, size], [s, s]) for i, s in zip(x, sigma.tolist())]
    assert_images(msn.gaussian_blur(x, sigma, radius), theirs)
    assert_images(msn.gaussian_blur(x, torch.full_like(sigma, 1e-3), radius), x, atol=0)


def coloured_by_torchvision(crops, jitter, grey, blur, blur_sigma, solarise, threshold):
    """What photometry does, with torchvision's functions, from the same random numbers.

    Returns images, how often each change was made, the jitters' order, and which pixels were so
    near to the threshold that rounding decides whether solarise inverts them."""
    V, B = crops.shape[:2]
    shifts = torch.tensor(jitter) * (2 * torch.rand(V, B, 4).flatten(0, 1) - 1)
    order = torch.randperm(4).tolist()
    jittered, is_grey, sigma, blurred, solarised = (torch.rand(V, B).flatten() for _ in range(5))
    sigma = blur_sigma[0] + (blur_sigma[1] - blur_sigma[0]) * sigma
    chosen = torch.stack([jittered < 0.8, is_grey < grey, blurred < blur, solarised < solarise])
    taps = 2 * min(math.ceil(3 * blur_sigma[1]), crops.shape[-1] - 1) + 1
    images = []
    near = []
    for i, crop in enumerate(crops.flatten(0, 1)):
        image = TF.to_dtype(crop, torch.float32, scale=True)
        for kind in order if chosen[0, i] else ():
            image = changed_by_torchvision(image, kind, shifts[i, kind].item())
        if chosen[1, i]:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if chosen[2, i]:
            image = TF.gaussian_blur(image, [taps, taps], [sigma[i].item()] * 2)
        near.append((image - threshold).abs() < 2 * ATOL)
        images.append(TF.solarize(image, threshold) if chosen[3, i] else image)
    return torch.stack(images), chosen.sum(dim=1), tuple(order), torch.stack(near)


def assert_coloured(crops, seed, options):
    """-> how often each change was made, and the order of the jitters."""
    torch.manual_seed(seed)
    theirs, counts, order, near = coloured_by_torchvision(crops, *options)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    mine = msn.photometry(crops, *options)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else was drawn
    assert mine.dtype == torch.float32
    if options[-2] == 0 or options[-1] == 0:  # nothing, or everything, is inverted
        near = torch.zeros_like(near)
    assert near.float().mean() < 0.05
    # Contrast and saturation magnify what the jitters before them were off by, to (1 + strength).
    assert_images(mine.where(~near, 0), theirs.where(~near, 0), atol=4 * ATOL)
    return counts, order


def crops_of(size):
    """Two views of the pictures, uint8."""
    return torch.stack([(255 * pictures(size)).byte()] * 2)


EACH = {  # one change, of every image: grey, blur, blur_sigma, solarise, threshold
    "nothing": (0.0, 0.0, [0.1, 2.0], 0.0, 0.5),
    "grey": (1.0, 0.0, [0.1, 2.0], 0.0, 0.5),
    "blur": (0.0, 1.0, [0.1, 2.0], 0.0, 0.5),
    "solarise": (0.0, 0.0, [0.1, 2.0], 1.0, 0.3),
    "invert": (0.0, 0.0, [0.1, 2.0], 1.0, 0.0),
}


@pytest.mark.parametrize("change", EACH)
def test_one_change_of_every_image(change):
    options = EACH[change]
    crops = crops_of(16)
    counts, _ = assert_coloured(crops, 0, ([0.0] * 4, *options))
    assert counts[1:].tolist() == [34 * x for x in (options[0], options[1], options[3])]
    if change == "nothing":
        pixels = msn.photometry(crops, [0.0] * 4, *options)
        assert torch.equal(pixels, crops.flatten(0, 1).float() / 255)


ALL = {  # jitter, grey, blur, blur_sigma, solarise, threshold
    "study": ([0.4, 0.4, 0.4, 0.1], 0.2, 0.5, [0.1, 2.0], 0.3, 0.5),
    "strong": ([1.5, 1.5, 1.5, 0.5], 0.2, 0.5, [0.1, 2.0], 0.3, 0.3),
    "plates": ([0.8, 0.8, 0.0, 0.0], 0.0, 0.0, [0.1, 0.7], 0.5, 0.0),
}


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
def test_every_order_of_the_jitters_in_groups_of_images(options, monkeypatch):
    """On a CPU images are changed in groups that fit its cache, here of 21; each group has the
    images and the numbers that belong there."""
    groups = []
    jitter_colours = msn.jitter_colours

    def spied(image, shifts, order):
        groups.append(len(image))
        return jitter_colours(image, shifts, order)

    monkeypatch.setattr(msn, "jitter_colours", spied)
    orders = set()
    totals = 0
    for seed in range(200):
        torch.manual_seed(seed)
        torch.rand(2, 17, 4)
        order = tuple(torch.randperm(4).tolist())
        if order in orders:
            continue
        groups.clear()
        counts, drawn = assert_coloured(crops_of(64), seed, options)
        assert drawn == order and groups == [21, counts[0] - 21]
        orders.add(order)
        totals += counts
    assert len(orders) == 24
    for total, share in zip(totals, (0.8, *options[1:3], options[4]), strict=True):
        deviation = (24 * 34 * share * (1 - share)) ** 0.5
        assert abs(total - 24 * 34 * share) <= 4 * deviation


def test_normalise_by_imagenet_or_by_the_image():
    x = pictures()[:8]
    theirs = [TF.normalize(i, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for i in x]
    assert_images(msn.normalise(x, False), theirs, atol=5 * ATOL)  # divided by 0.22
    own = msn.normalise(x, True)
    assert_images(own, [(i - i.mean()) / (i.std() + 1e-3) for i in x], atol=5 * ATOL)
    assert own.mean(dim=(1, 2, 3)).abs().max() < 1e-5
    assert (own.std(dim=(1, 2, 3)) - 1).abs().max() < 0.02
    assert_images(msn.normalise(0.3 * x + 0.4, True), own, atol=0.03)  # brightness and contrast go
    assert not msn.normalise(torch.full((1, 3, 8, 8), 0.25), True).any()  # flat: no division by 0


# ---- 2. Crops


def smooth(size, batch):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phase = torch.arange(3 * batch).view(batch, 3, 1, 1)
    waves = torch.sin(6 * x / size + phase) + torch.cos(5 * y / size + 2 * phase)
    return (255 * (waves + 2) / 4).round().byte()


def numbers_of_box(size, left, top, width, height, area=(0, 1), tries=0):
    """The uniform numbers (10, 4) by which, of such areas, this box is cropped after `tries` that
    do not fit the image: they have its area, but are wider than high, as 16 to 9."""
    u = torch.full((10, 4), 0.5)
    u[:tries, 0] = 1.0
    u[:tries, 1] = 1.5
    u[tries:, 0] = (width * height / size**2 - area[0]) / (area[1] - area[0])
    u[tries:, 1] = (math.log(width / height, 4 / 3) + 1) / 2
    u[0, 2] = left / max(size - width, 1)
    u[0, 3] = top / max(size - height, 1)
    return u


@pytest.mark.parametrize("size, area", [(16, (0, 1)), (32, (0.1, 1)), (48, (0.05, 1))])
def test_crops_equal_torchvision_image_by_image(size, area):
    """Of boxes of whole pixels, of all places and tries; not at the box's edge, where torchvision
    repeats its last pixels. If none of ten tries fits, the first is cut to the image."""
    B = 44
    images = smooth(64, B)
    rng = np.random.default_rng(size)
    numbers = []
    theirs = []
    for i in range(B):
        width, height = (int(side) for side in rng.integers(24, 65, size=2))
        if i % 11 == 10:
            width = 64
            height = 48
        left, top = (int(rng.integers(0, 65 - side)) for side in (width, height))
        u = numbers_of_box(64, left, top, width, height, area, tries=i % 11)
        u[1, 2] = flip = i % 3 / 2  # 0, 0.5 and 1; below 0.3 it is flipped
        numbers.append(u)
        crop = TF.resized_crop(images[i], top, left, height, width, [size, size], antialias=False)
        theirs.append(TF.horizontal_flip(crop) if flip < 0.3 else crop)
    mine = msn.crop_batch(images, torch.stack(numbers), area, size, flip=0.3)
    assert mine.dtype == torch.uint8 and mine.shape == (B, 3, size, size)
    edge = 1 + size // 24  # an enlarged pixel's half
    difference = (mine.int() - torch.stack(theirs).int())[..., edge:-edge, edge:-edge].abs()
    assert difference.max() <= 1  # of 255: rounding


def test_crop_of_the_whole_image_is_the_image():
    images = (255 * rand(2, 3, 32, 32)).byte()
    whole = torch.stack([numbers_of_box(32, 0, 0, 32, 32)] * 2)
    assert torch.equal(msn.crop_batch(images, whole, (0, 1), 32, 0.0), images)
    assert torch.equal(msn.crop_batch(images, whole, (0, 1), 32, 1.0), images.flip(3))


# ---- 3. CroppedViews


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen files of different sizes, and their paths."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = [str(root / f"{i}.png") for i in range(16)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(256, size=(40 + i, 60 - i, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(params=["grey", "colour", "files"])
def images(request, folder):
    if request.param == "files":
        return folder
    return (255 * rand(16, 1 if request.param == "grey" else 3, 32, 32)).byte()


SIZES = [(3, 24, [0.3, 1.0]), (2, 16, [0.1, 0.3])]  # views, pixels, area


def cropped_views(images, batch_size=4, seed=0, sizes=SIZES, flip=0.5):
    args = SimpleNamespace(flip=flip, seed=seed, batch_size=batch_size)
    return msn.CroppedViews(images, sizes, args)


def test_views_have_shape_and_type(images):
    item = cropped_views(images)[7, [3, 1, 4, 15]]
    assert [tuple(view.shape) for view in item] == [(3, 4, 3, 24, 24), (2, 4, 3, 16, 16)]
    assert {view.dtype for view in item} == {torch.uint8}
    assert all(view.is_contiguous() for view in item)  # torch pins no memory that overlaps itself
    first = item[0]
    for v in range(1, 3):  # each view has its own crop
        assert (first[0].int() - first[v].int()).abs().float().mean() > 5
    if torch.is_tensor(images) and images.shape[1] == 1:
        assert torch.equal(first[:, :, 0], first[:, :, 2])


def test_items_depend_on_seed_step_and_indices_only(images):
    indices = [5, 2, 9, 11]
    views = cropped_views(images, seed=3)
    torch.manual_seed(0)
    item = views[12, indices]
    twice = views[13, [5] * 4]
    assert not torch.equal(twice[0][:, 0], twice[0][:, 1])  # each place has crops of its own
    torch.manual_seed(99)
    for same in (views[12, indices], cropped_views(images, seed=3)[12, indices]):
        assert all(map(torch.equal, same, item))
    for other in (views[13, indices], cropped_views(images, seed=4)[12, indices]):
        assert not any(map(torch.equal, other, item))


def shares(script, processes, make, monkeypatch):
    """make(slice of this process) in each of so many processes, one after another."""
    monkeypatch.setattr(script, "world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(script, "rank", lambda rank=rank: rank)
        yield make(slice(8 // processes * rank, 8 // processes * (rank + 1)))


@pytest.mark.parametrize("processes", [2, 4])
def test_joined_items_of_processes_are_the_item_of_one(processes, images, monkeypatch):
    indices = [5, 2, 9, 11, 0, 14, 7, 3]

    def item(share):
        return cropped_views(images, batch_size=8, seed=3)[12, indices[share]]

    whole = item(slice(8))
    parts = shares(msn, processes, item, monkeypatch)
    assert all(map(torch.equal, [torch.cat(size, dim=1) for size in zip(*parts)], whole))


@each_script
def test_two_processes_draw_what_one_draws(script, monkeypatch):
    """Colours, noise, masks and depths: everything that a script draws for a batch."""
    args = script.parse_args(MORE[script])
    V = 1 if script in (mae, data2vec) else 2
    crops = (255 * rand(V, 8, 3, args.image_size, args.image_size)).byte()

    def inputs(share):
        """A list of tensors in which the images are the first dimension."""
        torch.manual_seed(0)
        made = getattr(script, VIEWS[script])(crops[:, share], args, torch.device("cpu"))
        if script is simclr:
            return made.chunk(2)
        if script is data2vec:
            return [made[0], made[1].permute(2, 0, 1, 3, 4)]
        return list(made)

    whole = inputs(slice(8))
    parts = shares(script, 2, inputs, monkeypatch)
    for mine, theirs in zip(whole, zip(*parts), strict=True):
        # A number of an image is a sum over its pixels, in another order in a larger batch.
        torch.testing.assert_close(torch.cat(theirs), mine, rtol=0, atol=1e-5)


# ---- 4. Files


def save_modes(root):
    """Save square files of many modes.

    Returns {path: (the RGB values expected, by how much they may differ)}."""
    rng = np.random.default_rng(0)
    modes = {}
    colour = rng.integers(256, size=(24, 24, 3), dtype=np.uint8)
    grey = rng.integers(256, size=(24, 24), dtype=np.uint8)
    bits = rng.integers(2, size=(24, 24)).astype(bool)
    y, x = np.mgrid[:24, :24]
    gentle = np.stack([8 * x, 8 * y, 100 + 2 * (x + y)], axis=2).astype(np.uint8)

    def save(name, image, expected, off=0, **options):
        image.save(root / name, **options)
        modes[str(root / name)] = np.broadcast_to(expected, (24, 24, 3)), off

    save("rgb.png", Image.fromarray(colour), colour)
    save("grey.png", Image.fromarray(grey), grey[..., None])
    save("grey_alpha.png", Image.fromarray(np.dstack([grey, grey[::-1]])), grey[..., None])
    save("bit.png", Image.fromarray(bits), 255 * bits[..., None])
    save("alpha.png", Image.fromarray(np.dstack([colour, grey])), colour)
    palette = Image.fromarray(grey).convert("RGB").quantize(64)
    expected = np.array(palette.convert("RGB"))
    save("palette.png", palette, expected)
    save("transparent.png", palette, expected, transparency=3)
    save("translucent.png", palette, expected, transparency=bytes(range(0, 256, 4)))
    save("grey.jpg", Image.fromarray(gentle).convert("L"), gentle.mean(2, keepdims=True), 60)
    save("cmyk.jpg", Image.fromarray(gentle).convert("CMYK"), gentle, 12, quality=95)
    for orientation, upright in ((3, np.rot90(colour, 2)), (6, np.rot90(colour, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(f"turned{orientation}.png", Image.fromarray(colour), upright, exif=exif)
    return modes


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_files_of_all_modes_and_orientations_are_read(tmp_path):
    modes = save_modes(tmp_path)
    whole = [(1, 24, [1.0, 1.0])]  # all of a square
    views = cropped_views(list(modes), batch_size=len(modes), sizes=whole, flip=0.0)
    (item,) = views[0, list(range(len(modes)))]
    for image, (path, (expected, off)) in zip(item[0], modes.items(), strict=True):
        difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= off, path


def test_a_missing_file_is_named(folder):
    with pytest.raises(sampler.Unreadable, match=r"^no\.jpg: unreadable image \("):
        cropped_views([*folder, "no.jpg"])[0, [2, 16, 4, 0]]
