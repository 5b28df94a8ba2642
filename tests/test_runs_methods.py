"""Runs: what only one method has. The rest is in test_runs.py."""

import copy
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from runs import compute_jointly, on_pictures, results, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

import data2vec
import linear_eval
import mae
import msn
import simclr
import vicreg

pytestmark = pytest.mark.usefixtures("one_thread", "on_the_cpu", "few_plates")


# ---- 1. MSN

WITHIN = {  # how far processes may be, and must be if something is not joined, from one
    "float64": (0, 1e-12),
    "float32": (0, 1e-5),
    "bfloat16": (0, 0.1),  # mixed precision, as on GPUs
    "local BatchNorm": (0.1, 10),
    "local mean": (0.1, 10),
}


def joint_step(rank, processes, case):
    """Loss terms, gradients and buffers by this process's share of a batch."""
    torch.manual_seed(0)
    encoder = msn.VisionTransformer(16, 8, 16, 1, 2, stem=[8] * 5)
    model = msn.MSN(encoder, 16, 24, 8, 12)
    for weight in encoder.blocks.parameters():  # at the start representations are so alike that
        weight.data *= 3 if weight.ndim > 1 else 1  # BatchNorm would magnify rounding
    dtype = torch.float64 if case == "float64" else torch.float32
    model = model.to(dtype)
    target = copy.deepcopy(model).requires_grad_(False)
    views = [torch.rand(V, 8, 3, size, size) for V, size in ((1, 16), (2, 16), (3, 8))]
    share = slice(8 // processes * rank, 8 // processes * (rank + 1))
    target_view, *anchor_views = (x[:, share].flatten(0, 1).to(dtype) for x in views)
    parallel = DistributedDataParallel(model) if processes > 1 else model
    with pytest.MonkeyPatch.context() as patch:
        if case == "local BatchNorm":
            patch.setattr(msn.BatchNorm, "forward", nn.BatchNorm1d.forward)
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "bfloat16"):
            targets, _ = target([target_view])
            anchors, prototypes = parallel(anchor_views, torch.tensor([2, 0, 3]))
        if case == "local mean":
            patch.setattr(msn, "all_reduce_mean", lambda x: x)
        terms = msn.msn_loss(anchors, targets, prototypes, me_max_weight=5.0, sinkhorn=True)
        terms[0].backward()
    result = dict(terms=msn.all_reduce_mean(torch.stack(terms).detach()))
    result["gradients"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    for network, name in ((model, "anchor"), (target, "target")):
        result |= {f"{name} {key}": buffer for key, buffer in network.named_buffers()}
    return result


def joint_steps(rank, processes):
    return {case: joint_step(rank, processes, case) for case in WITHIN}


def test_processes_compute_what_one_computes(tmp_path):
    joint = compute_jointly(joint_steps, tmp_path)
    assert [len(workers) for workers in joint.values()] == [4, 2]
    for case, (low, high) in WITHIN.items():
        alone = joint_step(0, 1, case)
        assert len(alone) == 2 + 2 * 7 * 3  # BatchNorms: five in the stem, two in the projector
        for worker in joint[2] + joint[4]:
            distances = {
                name: ((worker[case][name] - x).double().norm() / x.double().norm()).item()
                for name, x in alone.items()
            }
            assert low <= max(distances.values()) < high, (case, distances)


def test_focal_views_are_seen_and_count(pictures, tmp_path):
    losses = []
    for number in (0, 3):
        options = "--steps", 1, "--focal-views", number
        msn.main(on_pictures(msn, pictures, tmp_path / str(number), *options))
        losses.append(results(tmp_path / str(number))[1][0]["loss"])
        with Image.open(tmp_path / f"{number}/views.png") as views:
            assert views.size == (2 + 8 * 34, 2 + (1 + 2 + number) * 34)  # a row a view
    assert abs(losses[0] - losses[1]) > 1e-3


def test_timm_takes_the_encoder_of_a_checkpoint(tmp_path):
    import timm  # slow

    state, _ = run(msn, tmp_path, "--steps", 2, "--stem", "--batch-size", 16)
    options = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    theirs = timm.models.VisionTransformer(**options)
    theirs.load_state_dict(state["encoder"])
    mine = msn.VisionTransformer(32, 8, 16, 1, 2)
    mine.load_state_dict(state["encoder"])
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert expected.std() > 0.1
        torch.testing.assert_close(mine.eval()(images), expected, rtol=0, atol=1e-5)
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0)
        mine = msn.VisionTransformer()  # the paper's
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in (mine, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 150


# ---- 2. SimCLR and VICReg


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_takes_the_encoder(arch):
    torch.manual_seed(0)
    mine, dim = simclr.resnet(arch, 48)
    for x in [*mine.parameters(), *mine.buffers()]:
        if x.ndim == 1:  # so that no branch is 0
            x.data += torch.rand(x.shape) / 2
    theirs = getattr(models, arch)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(mine.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert expected.shape == (2, dim) and expected.std() > 0.01
        torch.testing.assert_close(mine.eval()(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_residual_branches_start_at_zero_and_small_images_keep_their_size(arch):
    network, _ = vicreg.resnet(arch, 32)
    blocks = [m for m in network.modules() if hasattr(m, "downsample")]
    assert len(blocks) == {"resnet18": 8, "resnet50": 16}[arch]
    for block in blocks:
        last = block.bn2 if arch == "resnet18" else block.bn3
        assert not last.weight.any() and block.bn1.weight.all()
    sizes = []
    network.layer1.register_forward_hook(lambda *x: sizes.append(tuple(x[1][0].shape[2:])))
    network(torch.rand(2, 3, 32, 32))
    assert sizes == [(32, 32)]
    kinds = {type(m) for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {vicreg.BatchNorm}  # all are over the processes


def test_simclrs_spread_is_that_of_unit_vectors():
    for z, expected in (
        (torch.ones(4, 2), 0),
        (torch.tensor([[0.0, 2.0], [0.0, 5.0]]), 0),  # lengths do not count
        (torch.eye(2).repeat(2, 1), 0.5**0.5),
        (torch.cat([torch.eye(8), -torch.eye(8)]), 1),
        (torch.tensor([[3.0, 4.0]]), 0),  # one image
    ):
        assert simclr.embedding_std(z).item() == pytest.approx(expected, abs=1e-3)


def test_vicregs_views_and_terms_have_options_of_their_own(tmp_path, monkeypatch):
    seen = []
    photometry = vicreg.photometry

    def spy(views, jitter, grey, blur, blur_sigma, solarise, threshold):
        seen.append((blur, solarise, threshold))
        return photometry(views, jitter, grey, blur, blur_sigma, solarise, threshold)

    monkeypatch.setattr(vicreg, "photometry", spy)
    options = "--blur", 1.0, 0.1, "--solarise", 0.0, 0.2, "--threshold", 0.5
    options += "--sim-coeff", 0, "--std-coeff", 3, "--cov-coeff", 7
    _, (line,) = run(vicreg, tmp_path, *options, "--steps", 1)
    assert seen == [(1.0, 0.0, 0.5), (0.1, 0.2, 0.5)]
    expected = 3 * line["variance"] + 7 * line["covariance"]
    assert line["loss"] == pytest.approx(expected, rel=1e-5) and line["invariance"] > 0


# ---- 3. MAE and data2vec


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_reconstruction_of_a_perfect_prediction_is_the_image(norm_pix_loss, tmp_path):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    mask = (torch.arange(32).view(2, 16) % 2).float()
    patches = mae.patchify(images, 8)
    pred = patches
    if norm_pix_loss:
        mean, deviation = mae.patch_statistics(patches)
        pred = (patches - mean) / deviation
    model = types.SimpleNamespace(patch_size=8, norm_pix_loss=norm_pix_loss)
    mae.draw_reconstruction(images, pred, mask, model, tmp_path)
    with Image.open(tmp_path / "reconstruction.png") as picture:
        rows = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    rows = [rows[:, 2 + 34 * i :][:, :32, 2:34] for i in range(3)]
    expected = (images[0] - images.min()) / (images.max() - images.min())
    torch.testing.assert_close(rows[0], expected, rtol=0, atol=0.005)
    torch.testing.assert_close(rows[2], expected, rtol=0, atol=0.005)
    assert (rows[1][:, :, 8:16] == rows[1][0, 0, 8]).all()  # a removed patch is flat
    torch.testing.assert_close(rows[1][:, :, :8], rows[0][:, :, :8], rtol=0, atol=0.005)


def assert_evaluates(folder):
    linear_eval.main([str(folder / "checkpoint.pt"), "--epochs", "1"])
    report = json.loads((folder / "linear_eval_plates_digits.json").read_text())
    assert 0 < report["top1"] < 100 and report["best"]["feature"] in ("cls", "cls4", "patches")


def test_maes_encoder_is_evaluated(tmp_path):
    state, _ = run(mae, tmp_path, "--steps", 2)
    encoder = linear_eval.load_encoder(tmp_path / "checkpoint.pt")
    images = torch.rand(3, 3, 32, 32)
    whole = mae.MAE(32, 8, 16, 1, 2, 8, 1, 1)
    whole.load_state_dict(state["mae"])
    with torch.no_grad():
        every = torch.arange(16).expand(3, -1)
        torch.testing.assert_close(whole.encode(images, every)[:, 0], encoder(images))
    control = linear_eval.untrained(encoder)
    assert torch.equal(control.pos_embed, encoder.pos_embed)  # fixed, so the control has it
    weight = "blocks.0.attn.qkv.weight"
    assert not torch.equal(control.state_dict()[weight], encoder.state_dict()[weight])
    assert_evaluates(tmp_path)


def test_data2vecs_target_is_evaluated(tmp_path):
    state, _ = run(data2vec, tmp_path, "--steps", 2)
    encoder = linear_eval.load_encoder(tmp_path / "checkpoint.pt")
    pixels = (torch.rand(3, 3, 32, 32) * 255).round().byte()
    found = linear_eval.features(encoder, pixels)
    own = data2vec.BeiT(32, 8, 16, 2, 2)
    own.load_state_dict(state["encoder"])
    with torch.no_grad():
        tokens = own.norm(own(data2vec.normalise(pixels / 255, standardise=True))[-1])
    torch.testing.assert_close(found["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["patches"], tokens[:, 1:].mean(dim=1), rtol=1e-5, atol=1e-5)
    assert_evaluates(tmp_path)
