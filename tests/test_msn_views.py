"""msn.py's views: colours and crops against torchvision, image files, processes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional as TF

import msn


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from more threads, and lose much beside other programs."""
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


# ---- 1. Colours

# Ours, torchvision's, the lowest and the highest amount, and the one that changes nothing.
ADJUSTMENTS = {
    "brightness": (msn.adjust_brightness, TF.adjust_brightness, 0, 2, 1.0),
    "contrast": (msn.adjust_contrast, TF.adjust_contrast, 0, 2, 1.0),
    "saturation": (msn.adjust_saturation, TF.adjust_saturation, 0, 2, 1.0),
    "hue": (msn.adjust_hue, TF.adjust_hue, -0.5, 0.5, 0.0),
}


@pytest.mark.parametrize("kind", range(4), ids=ADJUSTMENTS.keys())
def test_adjustments_equal_torchvisions(kind):
    ours, theirs, low, high, neutral = list(ADJUSTMENTS.values())[kind]
    x = pictures()
    for amount in (low, high, neutral, *uniform(7, seed=kind).tolist()):
        amounts = low + (high - low) * uniform(len(x), seed=int(1e6 * (amount + 1)))
        amounts[::2] = min(max(amount, low), high)
        expected = [theirs(image, a) for image, a in zip(x, amounts.tolist())]
        assert_images(ours(x, amounts.view(-1, 1, 1, 1)), expected)
    unchanged = ours(x, torch.full([len(x), 1, 1, 1], neutral))
    assert_images(unchanged, x, atol=2e-6)


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
    views = (255 * pictures(16)).byte()
    u = uniform(17, 13)
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
    theirs = []
    near = []  # pixels so near to the threshold that rounding decides what is inverted
    orders = set()
    applied = torch.zeros(4)
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
    mine = msn.photometry(views, u, **options)
    near = torch.stack(near)
    assert near.float().mean() < 0.03
    assert_images(mine.where(~near, 0.0), torch.stack(theirs).where(~near, 0.0))


def test_photometry_of_an_image_does_not_depend_on_its_batch():
    views = (255 * pictures(16)).byte()
    u = uniform(17, 13)
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
    u[:, 0] = 0.5
    u[:, 1] = (math.log(width / height, 4 / 3) + 1) / 2
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
    image = smooth(64)
    box = dict(left=left, top=top, width=width, height=height)
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
    N = 6000
    ramp = 2 * torch.arange(128)
    image = torch.stack([ramp.expand(128, 128), ramp[:, None].expand(128, 128)] * 2)[:3].byte()
    u = uniform(N, 10, 4, seed=1)
    crops = [
        msn.crop_batch(image.expand(len(v), -1, -1, -1), v, area, 8, 0.5) for v in u.split(500)
    ]
    crops = torch.cat(crops).double()
    x = crops[:, 0, 0]  # (N, 8)
    y = crops[:, 1, :, 0]
    w, h = ((z[:, -1] - z[:, 0]) * 8 / 7 / 256 for z in (x, y))
    flipped = (w < 0).double()
    w = w.abs()
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
            a = moment(value)
            b = moment(theirs[name])
            sigma = ((a.var() + b.var()) / N).sqrt()
            assert abs(a.mean() - b.mean()) < 5 * sigma + 5e-4, name


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


SIZES = [(3, 24, [0.3, 1.0]), (2, 16, [0.1, 0.3])]  # views, pixels, area


def cropped_views(images, seed=0, sizes=SIZES, flip=0.5):
    return msn.CroppedViews(images, sizes, SimpleNamespace(flip=flip, seed=seed))


def images_of(kind, folder):
    if kind == "files":
        return folder
    return (255 * uniform(16, 1 if kind == "grey" else 3, 32, 32)).byte()


def assert_items(mine, theirs):
    assert len(mine) == len(theirs)
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("kind", ["grey", "colour", "files"])
def test_views_have_shape_and_type(kind, folder):
    views = cropped_views(images_of(kind, folder))
    item = views[7, [3, 1, 4, 15]]
    assert [tuple(view.shape) for view in item] == [(3, 4, 3, 24, 24), (2, 4, 3, 16, 16)]
    assert {view.dtype for view in item} == {torch.uint8}
    assert all(view.is_contiguous() for view in item)  # torch pins no memory that overlaps itself
    first = item[0]
    for v in range(1, 3):  # each view has its own crop
        assert (first[0].int() - first[v].int()).abs().float().mean() > 5
    if kind == "grey":
        assert torch.equal(first[:, :, 0], first[:, :, 2])


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("kind", ["grey", "colour", "files"])
def test_joined_items_of_processes_are_the_item_of_one(kind, processes, folder, monkeypatch):
    images = images_of(kind, folder)
    indices = [5, 2, 9, 11, 0, 14, 7, 3]
    whole = cropped_views(images, seed=3)[12, indices]
    share = len(indices) // processes
    monkeypatch.setattr(msn, "world_size", lambda: processes)
    parts = []
    for rank in range(processes):
        with monkeypatch.context() as patch:
            patch.setattr(msn, "rank", lambda rank=rank: rank)
            views = cropped_views(images, seed=3)
        parts.append(views[12, indices[rank * share : (rank + 1) * share]])
    assert_items([torch.cat(size, dim=1) for size in zip(*parts)], whole)


@pytest.mark.parametrize("kind", ["colour", "files"])
def test_items_depend_on_seed_step_and_indices_only(kind, folder):
    images = images_of(kind, folder)
    indices = [5, 2, 9, 11]
    views = cropped_views(images, seed=3)
    torch.manual_seed(0)
    item = views[12, indices]
    twice = views[13, [5, 5]]
    assert not torch.equal(twice[0][:, 0], twice[0][:, 1])  # each place has crops of its own
    torch.manual_seed(99)
    assert_items(views[12, indices], item)
    assert_items(cropped_views(images, seed=3)[12, indices], item)
    for other in (views[13, indices], cropped_views(images, seed=4)[12, indices]):
        assert not torch.equal(other[0], item[0])
        assert not torch.equal(other[1], item[1])


def save_modes(root):
    """Save square files of many modes.

    Returns {path: (the RGB values expected, by how much they may differ)}."""
    rng = np.random.default_rng(0)
    modes = {}
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
    whole = [(1, 24, [1.0, 1.0])]  # all of a square
    views = cropped_views(list(modes), sizes=whole, flip=0.0)
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
    message = cropped_views([*folder, str(path)])[0, [2, 16, 4]]
    assert isinstance(message, str)
    assert message.startswith(f"{path}: unreadable image (") and "\n" not in message
    assert message.endswith("): fix or remove it")
    assert message.count(str(path)) <= 2
    with pytest.raises(msn.Refusal) as error:
        msn.read_image(str(path))
    assert str(error.value) == message
