"""msn.py's data: photometry and crops against torchvision, files, processes, plates, long tail."""

import math
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional as TF

import msn
from sampler import long_tail


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from more, and lose much beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_images(mine, theirs, atol=1e-5):
    torch.testing.assert_close(mine, torch.stack(list(theirs)), rtol=0, atol=atol)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(size=12):
    """Random images in [0, 1], and those at which formulas for hue and saturation divide by 0."""
    x = torch.zeros(17, 3, size, size)
    x[:6] = uniform(6, 3, size, size)
    x[6:8] = uniform(2, 1, size, size, seed=1)  # grey, of many levels
    x[9] = 1  # 8 is black, 9 white
    for i, corner in enumerate([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]):
        x[10 + i] = torch.tensor(corner).view(3, 1, 1)
    x[16] = (uniform(3, size, size, seed=2) * 2).floor()  # only corners of the colour cube
    return x


# ---- 1. Photometry


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_adjust_equals_torchvision(name):
    kind = ["brightness", "contrast", "saturation", "hue"].index(name)
    x, (low, high) = pictures(), (0, 2) if kind < 3 else (-0.5, 0.5)
    for amount in (low, high, float(kind < 3), *uniform(7, seed=kind).tolist()):
        amounts = low + (high - low) * uniform(len(x), seed=int(1e6 * (amount + 1)))
        amounts[::2] = min(max(amount, low), high)
        theirs = [getattr(TF, f"adjust_{name}")(i, a) for i, a in zip(x, amounts.tolist())]
        assert_images(msn.adjust(x, kind, amounts), theirs)
    neutral = torch.full([len(x)], float(kind < 3))
    assert_images(msn.adjust(x, kind, neutral), x, atol=2e-6)


@pytest.mark.parametrize("radius", [1, 3, 6])
def test_gaussian_blur_equals_torchvision(radius):
    x = pictures()
    sigma = 0.1 + 2 * uniform(len(x))
    size = 2 * radius + 1
    theirs = [TF.gaussian_blur(i, [size, size], [s, s]) for i, s in zip(x, sigma.tolist())]
    assert_images(msn.gaussian_blur(x, sigma, radius), theirs)
    assert_images(msn.gaussian_blur(x, torch.full_like(sigma, 1e-3), radius), x, atol=0)


PLAIN = dict(jitter=[0.0] * 4, grey=0.0, blur=0.0, solarise=0.0, threshold=0.5)
PLAIN |= dict(blur_sigma=[0.1, 2.0])


def test_photometry_without_changes_is_division_by_255():
    views = (255 * pictures(16)).byte()
    image = msn.photometry(views, uniform(len(views), 13), **PLAIN)
    assert image.dtype == torch.float32
    assert_images(image, views.float() / 255, atol=0)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5])
def test_grey_and_solarise_equal_torchvision(threshold):
    views, u = (255 * pictures(16)).byte(), uniform(17, 13)
    floats = views.float() / 255
    grey = msn.photometry(views, u, **PLAIN | dict(grey=1.0))
    assert_images(grey, [TF.rgb_to_grayscale(x, 3) for x in floats])
    solarised = msn.photometry(views, u, **PLAIN | dict(solarise=1.0, threshold=threshold))
    assert_images(solarised, [TF.solarize(x, threshold) for x in floats])
    if threshold == 0:
        assert_images(solarised, [TF.invert(x) for x in floats])


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize(
    "jitter", [[0.4, 0.4, 0.4, 0.1], [0.8, 0.8, 0.0, 0.0], [1.5, 1.5, 1.5, 0.5]]
)
def test_photometry_equals_a_chain_of_torchvision(jitter, threshold):
    views = torch.cat([(255 * pictures(16)).byte()] * 8)
    u = uniform(len(views), 13, seed=3)
    options = dict(jitter=jitter, grey=0.2, blur=0.5, blur_sigma=[0.1, 2.0])
    options |= dict(solarise=0.3, threshold=threshold)
    theirs, applied, orders, near = [], torch.zeros(4), set(), []
    for view, numbers in zip(views, u.tolist()):
        apply_jitter, *amounts, is_grey, is_blurred, width, is_solarised = numbers[:9]
        order = sorted(range(4), key=numbers[9:].__getitem__)
        image = TF.to_dtype(view, torch.float32, scale=True)
        for kind in order if apply_jitter < 0.8 else ():
            amount = jitter[kind] * (2 * amounts[kind] - 1)
            if kind == 0:
                image = TF.adjust_brightness(image, max(1 + amount, 0))
            elif kind == 1:
                image = TF.adjust_contrast(image, max(1 + amount, 0))
            elif kind == 2:
                image = TF.adjust_saturation(image, max(1 + amount, 0))
            else:
                image = TF.adjust_hue(image, amount)
        if is_grey < 0.2:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if is_blurred < 0.5:
            image = TF.gaussian_blur(image, [13, 13], [0.1 + 1.9 * width] * 2)
        near.append((image - threshold).abs() < (1e-4 if threshold else 0))
        if is_solarised < 0.3:
            image = TF.solarize(image, threshold)
        theirs.append(image)
        orders.add(tuple(order))
        applied += torch.tensor(
            [apply_jitter < 0.8, is_grey < 0.2, is_blurred < 0.5, is_solarised < 0.3]
        )
    assert (applied > 10).all() and (applied < len(views) - 10).all() and len(orders) == 24
    mine, near = msn.photometry(views, u, **options), torch.stack(near)
    assert near.float().mean() < 0.03  # there rounding decides what is inverted
    assert_images(mine.where(~near, 0.0), torch.stack(theirs).where(~near, 0.0))


def test_photometry_of_an_image_does_not_depend_on_its_batch():
    views, u = (255 * pictures(16)).byte(), uniform(17, 13)
    options = dict(jitter=[0.4, 0.4, 0.4, 0.1], grey=0.2, blur=0.5, blur_sigma=[0.1, 2.0])
    options |= dict(solarise=0.3, threshold=0.0)
    joined = msn.photometry(views, u, **options)
    for i in range(len(views)):
        alone = msn.photometry(views[i : i + 1], u[i : i + 1], **options)
        assert_images(alone, joined[i : i + 1], atol=1e-6)


def test_normalise_by_imagenet_or_by_the_image():
    x = pictures()[:8]
    theirs = [TF.normalize(i, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for i in x]
    assert_images(msn.normalise(x, False), theirs)
    own = msn.normalise(x, True)
    assert_images(own, [(i - i.mean()) / (i.std() + 1e-3) for i in x])
    assert own.mean(dim=(1, 2, 3)).abs().max() < 1e-5
    assert (own.std(dim=(1, 2, 3)) - 1).abs().max() < 0.02
    assert_images(msn.normalise(0.3 * x + 0.4, True), own, atol=0.03)  # brightness and contrast go
    assert not msn.normalise(torch.full((1, 3, 8, 8), 0.25), True).any()  # flat: no division by 0


# ---- 2. Crops


def smooth(size, batch=1):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phase = torch.arange(3 * batch).view(batch, 3, 1, 1)
    waves = torch.sin(6 * x / size + phase) + torch.cos(5 * y / size + 2 * phase)
    return (255 * (waves + 2) / 4).round().byte()


def box_numbers(size, left, top, width, height):
    """The uniform numbers (10, 4) and the fraction of area for a given box."""
    u = torch.zeros(10, 4)
    u[:, 0], u[:, 1] = 0.5, (math.log(width / height, 4 / 3) + 1) / 2
    u[:, 2] = left / max(size - width, 1)
    u[:, 3] = top / max(size - height, 1)
    u[1, 2] = 0.5  # decides on the flip
    return u, width * height / size**2


def crop_box(image, size, flip=0.0, **box):
    u, area = box_numbers(image.shape[-1], **box)
    return msn.crop_batch(image, u[None], [area, area], size, flip)


def test_crop_of_the_whole_image_is_the_image():
    image = (255 * uniform(1, 3, 32, 32)).byte()
    whole = dict(left=0, top=0, width=32, height=32)
    assert torch.equal(crop_box(image, 32, **whole), image)
    assert torch.equal(crop_box(image, 32, flip=1.0, **whole), image.flip(3))


@pytest.mark.parametrize(
    "left, top, width, height", [(8, 20, 32, 32), (0, 28, 48, 36), (40, 0, 24, 32)]
)
@pytest.mark.parametrize("size", [16, 32, 48])
def test_crop_equals_torchvision_in_the_interior(size, left, top, width, height):
    image, box = smooth(64), dict(left=left, top=top, width=width, height=height)
    mine = crop_box(image, size, **box)
    theirs = TF.resized_crop(image, top, left, height, width, [size, size], antialias=False)
    assert mine.dtype == torch.uint8 and mine.shape == theirs.shape
    edge = size // 16  # at the border torchvision repeats the box's last pixels
    difference = (mine.int() - theirs.int())[..., edge:-edge, edge:-edge].abs()
    assert difference.max() <= 1
    flipped = crop_box(image, size, flip=1.0, **box)
    assert (flipped.int() - mine.flip(3).int()).abs().max() <= 1


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.35, 1.0), (0.05, 0.3)])
def test_crops_are_distributed_as_torchvisions(area):
    N, ramp = 6000, 2 * torch.arange(128)
    image = torch.stack([ramp.expand(128, 128), ramp[:, None].expand(128, 128)] * 2)[:3].byte()
    u = uniform(N, 10, 4, seed=1)
    crops = [
        msn.crop_batch(image.expand(len(v), -1, -1, -1), v, area, 8, 0.5) for v in u.split(500)
    ]
    x, y = torch.cat(crops).double()[:, 0, 0], torch.cat(crops).double()[:, 1, :, 0]  # (N, 8)
    w, h = ((z[:, -1] - z[:, 0]) * 8 / 7 / 256 for z in (x, y))  # a negative width: flipped
    flipped, w = (w < 0).double(), w.abs()
    centre_x, centre_y = ((z[:, 0] + z[:, -1] + 2) / 512 for z in (x, y))
    mine = dict(area=w * h, aspect=(w / h).log(), left=centre_x - w / 2, top=centre_y - h / 2)
    torch.manual_seed(0)
    canvas = torch.zeros(3, 1000, 1000, dtype=torch.uint8)
    draw = transforms.RandomResizedCrop.get_params
    boxes = [draw(canvas, area, (3 / 4, 4 / 3)) for _ in range(N)]
    top, left, h, w = torch.tensor(boxes).double().T / 1000
    theirs = dict(area=w * h, aspect=(w / h).log(), left=left, top=top)
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / N**0.5
    for name, value in mine.items():
        for moment in (lambda z: z, lambda z: (z - z.mean()).square()):
            a, b = moment(value), moment(theirs[name])
            sigma = ((a.var() + b.var()) / N).sqrt()
            assert abs(a.mean() - b.mean()) < 5 * sigma + 5e-4, name


# ---- 3. CroppedViews


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen files of different sizes, and their paths."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [str(root / f"{i}.png") for i in range(16)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(256, size=(40 + i, 60 - i, 3), dtype=np.uint8)).save(path)
    return paths


GROUPS = [(3, 24, [0.3, 1.0]), (2, 16, [0.1, 0.3])]


def images_of(kind, folder):
    if kind == "files":
        return folder
    return (255 * uniform(16, 1 if kind == "grey" else 3, 32, 32)).byte()


def assert_items(mine, theirs):
    assert len(mine) == len(theirs)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("kind", ["grey", "colour", "files"])
def test_views_have_shape_and_type(kind, folder):
    views = msn.CroppedViews(images_of(kind, folder), GROUPS, 0.5, 0, 0, 1)
    item = views[7, [3, 1, 4, 15]]
    assert [tuple(view.shape) for view in item] == [(3, 4, 3, 24, 24), (2, 4, 3, 16, 16)]
    assert {view.dtype for view in item} == {torch.uint8}
    first = item[0]
    for v in range(1, 3):  # each view has its own crop
        assert (first[0].int() - first[v].int()).abs().float().mean() > 5
    if kind == "grey":
        assert torch.equal(first[:, :, 0], first[:, :, 2])


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("kind", ["grey", "colour", "files"])
def test_joined_items_of_processes_are_the_item_of_one(kind, processes, folder):
    images, indices = images_of(kind, folder), [5, 2, 9, 11, 0, 14, 7, 3]
    whole = msn.CroppedViews(images, GROUPS, 0.5, 3, 0, 1)[12, indices]
    share = len(indices) // processes
    parts = [
        msn.CroppedViews(images, GROUPS, 0.5, 3, rank, processes)[
            12, indices[rank * share : (rank + 1) * share]
        ]
        for rank in range(processes)
    ]
    assert_items([torch.cat(group, dim=1) for group in zip(*parts)], whole)


@pytest.mark.parametrize("kind", ["colour", "files"])
def test_items_depend_on_seed_step_and_indices_only(kind, folder):
    images, indices = images_of(kind, folder), [5, 2, 9, 11]
    views = msn.CroppedViews(images, GROUPS, 0.5, 3, 0, 1)
    torch.manual_seed(0)
    item = views[12, indices]
    twice = views[13, [5, 5]]
    assert not torch.equal(twice[0][:, 0], twice[0][:, 1])  # each place has crops of its own
    torch.manual_seed(99)
    assert_items(views[12, indices], item)
    assert_items(msn.CroppedViews(images, GROUPS, 0.5, 3, 0, 1)[12, indices], item)
    for other in (views[13, indices], msn.CroppedViews(images, GROUPS, 0.5, 4, 0, 1)[12, indices]):
        assert not torch.equal(other[0], item[0])
        assert not torch.equal(other[1], item[1])


def save_modes(root):
    """Square files of many modes -> path: the RGB values expected, and how far they may be off."""
    rng, modes = np.random.default_rng(0), {}
    colour = rng.integers(256, size=(24, 24, 3), dtype=np.uint8)
    grey = rng.integers(256, size=(24, 24), dtype=np.uint8)
    bits = rng.integers(2, size=(24, 24)).astype(bool)
    alpha = np.dstack([colour, grey])
    y, x = np.mgrid[:24, :24]
    gentle = np.stack([8 * x, 8 * y, 100 + 2 * (x + y)], axis=2).astype(np.uint8)

    def save(name, image, expected, off=0, **options):
        image.save(root / name, **options)
        modes[str(root / name)] = np.broadcast_to(expected, (24, 24, 3)), off

    save("rgb.png", Image.fromarray(colour), colour)
    save("grey.png", Image.fromarray(grey), grey[..., None])
    save("grey_alpha.png", Image.fromarray(np.dstack([grey, grey[::-1]])), grey[..., None])
    save("bit.png", Image.fromarray(bits), 255 * bits[..., None])
    save("alpha.png", Image.fromarray(alpha), colour)
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


def test_files_of_all_modes_and_orientations_are_read(tmp_path):
    modes = save_modes(tmp_path)
    views = msn.CroppedViews(list(modes), [(1, 24, [1.0, 1.0])], 0.0, 0, 0, 1)  # all of a square
    item = views[0, list(range(len(modes)))]
    assert not isinstance(item, str), item
    for image, (path, (expected, off)) in zip(item[0][0], modes.items(), strict=True):
        difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= off, path


@pytest.mark.parametrize("kind", ["text", "empty", "cut jpeg", "cut png", "missing"])
def test_an_unreadable_file_is_named(kind, tmp_path, folder):
    path = tmp_path / f"broken.{kind.split()[-1] if 'cut' in kind else 'jpg'}"
    picture = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    if "cut" in kind:
        Image.fromarray(picture).save(path, format=kind.split()[1])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind != "missing":
        path.write_text("not a picture" if kind == "text" else "")
    message = msn.CroppedViews([*folder, str(path)], GROUPS, 0.5, 0, 0, 1)[0, [2, 16, 4]]
    assert isinstance(message, str)
    assert str(path) in message and "\n" not in message
    assert message.count(str(path)) <= 2


# ---- 4. Plates and long tail


def test_plates_are_drawn_in_seconds():
    start = time.process_time()  # of this process: other programs do not count
    images, labels = msn.draw_plates(50, seed=0)
    assert time.process_time() - start < 15  # 2.5 s alone; threads that wait count too
    assert images.shape == (50_000, 1, 32, 32) and images.dtype == torch.uint8
    number, digits, count, size = (labels[k] for k in ("number", "digits", "count", "size"))
    assert next(iter(labels)) == "number"  # the class
    assert torch.equal(number.bincount(), torch.full([1000], 50))
    assert torch.equal(digits @ torch.tensor([100, 10, 1]), number)
    assert digits.shape == (50_000, 3) and digits.min() == 0 and digits.max() == 9
    for bins, labels in ((4, count), (3, size)):  # near uniform: 5 standard deviations
        share = labels.bincount(minlength=bins) / 50_000
        assert len(share) == bins and (share - 1 / bins).abs().max() < 5 * (0.25 / 50_000) ** 0.5


def test_plates_follow_from_their_seed():
    torch.manual_seed(1)
    images, labels = msn.draw_plates(2, seed=3)
    state = torch.get_rng_state()
    again, same = msn.draw_plates(2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # numbers of its own
    other, _ = msn.draw_plates(2, seed=4)
    assert torch.equal(images, again)
    assert all(torch.equal(labels[name], same[name]) for name in labels)
    assert (images.int() - other.int()).abs().float().mean() > 20


def test_plates_show_their_labels():
    images, labels = msn.draw_plates(20, seed=0)
    pixels = images[:, 0].float()
    ground = pixels.flatten(1).mode(dim=1).values.view(-1, 1, 1)
    marks = (pixels - ground).abs().flatten(1)
    marks = marks / marks.amax(dim=1, keepdim=True)  # ink of the number is 1, discs are fainter
    inked = (marks > 0.6).float()
    known = torch.arange(len(marks)) % 20 >= 2
    means = inked[known].view(1000, 18, -1).mean(dim=1)
    guess = torch.nn.functional.normalize(inked[~known]) @ torch.nn.functional.normalize(means).T
    assert (guess.argmax(dim=1) == labels["number"][~known]).float().mean() > 0.1  # chance: 0.001
    faint = ((marks > 0.05) & (marks < 0.4)).float().mean(dim=1)
    by_count = torch.stack([faint[labels["count"] == count].mean() for count in range(4)])
    assert (by_count.diff() > 0.01).all()
    columns = torch.arange(len(marks[0])) % 32
    spread = (inked * (columns - 15.5).square()).sum(1) / inked.sum(1)
    by_size = torch.stack([spread[labels["size"] == size].mean() for size in range(3)])
    assert (by_size.diff() > 0.5).all()


def test_long_tail_keeps_a_power_of_the_rank():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 100))
    for exponent, expected in (
        (0.0, [100] * 10),
        (1.0, [100, 50, 33, 25, 20, 17, 14, 12, 11, 10]),
        (0.5, [100, 71, 58, 50, 45, 41, 38, 35, 33, 32]),
        (9.0, [100] + [1] * 9),  # at least one
    ):
        kept = long_tail(labels, exponent, seed=0)
        np.testing.assert_array_equal(np.bincount(labels[kept], minlength=10), expected)
        assert len(set(kept.tolist())) == len(kept)
    first, again, other = (long_tail(labels, 1.0, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first.tolist()) != set(other.tolist())
