"""Runs: what only one method has. The rest is in test_runs.py."""

import copy
import json
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from runs import SIAMESE, assert_same_log, assert_same_state, fork_group, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import models

import data2vec
import linear_eval
import mae
import msn
import sampler
import simclr
import vicreg

pytestmark = pytest.mark.usefixtures("one_thread")
siamese = pytest.mark.parametrize("script", SIAMESE, ids=["msn", "pmsn"])
convolutional = pytest.mark.parametrize("script", [simclr, vicreg], ids=["simclr", "vicreg"])


# ---- 1. MSN and PMSN

FAULTS = "none", "none, float64", "local BatchNorm", "local p_bar", "bfloat16"


def joint_step(rank, processes, fault):
    """One step on this process's share of a fixed batch -> loss terms, gradients and buffers."""
    torch.manual_seed(0)
    dtype = torch.float64 if "float64" in fault else torch.float32
    encoder = msn.VisionTransformer(16, 8, 16, 1, 2, stem=[8, 8, 8])
    model = msn.MSN(encoder, 16, 24, 8, 12)
    for weight in encoder.blocks.parameters():  # at the start representations are so alike that
        weight.data *= 3 if weight.ndim > 1 else 1  # BatchNorm would magnify rounding
    model = model.to(dtype)
    target = copy.deepcopy(model).requires_grad_(False)
    groups = [torch.rand(V, 8, 3, size, size) for V, size in ((1, 16), (2, 16), (3, 8))]
    share = slice(8 // processes * rank, 8 // processes * (rank + 1))
    first, *groups = (views[:, share].flatten(0, 1).to(dtype) for views in groups)
    parallel = DistributedDataParallel(model) if processes > 1 else model
    all_reduce_mean = msn.all_reduce_mean
    forward = msn.BatchNorm.forward
    if fault == "local BatchNorm":
        msn.BatchNorm.forward = nn.BatchNorm1d.forward
    with torch.autocast("cpu", torch.bfloat16, enabled=fault == "bfloat16"):
        targets, _ = target([first])
        anchors, prototypes = parallel(groups, torch.tensor([2, 0, 3]))
    if fault == "local p_bar":
        msn.all_reduce_mean = lambda x: x
    terms = msn.msn_loss(anchors, targets, prototypes, me_max_weight=5.0, sinkhorn=True)
    terms[0].backward()
    msn.all_reduce_mean = all_reduce_mean
    msn.BatchNorm.forward = forward
    result = {"terms": msn.all_reduce_mean(torch.stack(terms).detach())}
    result["gradients"] = torch.cat([p.grad.flatten() for p in model.parameters()])
    for network, name in ((model, "anchor"), (target, "target")):
        result |= {f"{name} {key}": buffer for key, buffer in network.named_buffers()}
    return result


def joint_steps(rank, folder):
    torch.set_num_threads(1)
    for processes in (4, 2):
        if rank < processes:
            store = dist.FileStore(f"{folder}/{processes}", processes)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
            for fault in FAULTS:
                result = joint_step(rank, processes, fault)
                torch.save(result, f"{folder}/{processes} {fault} {rank}")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def joint_results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    fork_group(joint_steps, folder, processes=4)
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_compute_what_one_computes(processes, joint_results):
    for fault, low, high in (
        ("none", 0, 1e-5),
        ("none, float64", 0, 1e-12),
        ("local BatchNorm", 0.1, 10),  # the distance would show what is not joined
        ("local p_bar", 0.1, 10),
        ("bfloat16", 0, 0.1),  # mixed precision, as on GPUs
    ):
        alone = joint_step(0, 1, "none" if fault.startswith("local") else fault)
        assert len(alone) == 2 + 2 * 5 * 3  # BatchNorms: three in the stem, two in the projector
        for rank in range(processes):
            joint = torch.load(joint_results / f"{processes} {fault} {rank}")
            distances = {
                name: ((joint[name] - x).double().norm() / x.double().norm()).item()
                for name, x in alone.items()
            }
            assert low <= max(distances.values()) < high, (fault, distances)


@siamese
def test_options_override_the_recipe(script):
    args = script.parse_args("--data pictures --lr 0.5 --sinkhorn --jitter 1 2 3 0.5".split())
    assert args.lr == 0.5 and args.sinkhorn is True and args.jitter == [1, 2, 3, 0.5]
    assert script.parse_args([]).sinkhorn and not script.parse_args(["--no-sinkhorn"]).sinkhorn
    assert script.parse_args(["--stem"]).stem == []


@siamese
def test_focal_views_of_files_with_loader_processes(script, tmp_path, pictures):
    options = "--recipe", "plates", "--data", pictures, "--batch-size", 16, "--epochs", 2
    options += "--focal-views", 3, "--k-classes", 4, "--flip", 0.5, "--blur", 0.5, "--grey", 0.2
    state, log = run(script, tmp_path / "two", *options, "--workers", 2)
    assert state["step"] == 6 and log[-1]["epoch"] == 1
    none = run(script, tmp_path / "none", *options, "--workers", 0)
    assert_same_state(none[0], state)
    assert_same_log(none[1], log)
    with Image.open(tmp_path / "two/views.png") as views:
        assert views.size == (2 + 8 * 34, 2 + (1 + 2 + 3) * 34)  # a row a view
    with Image.open(tmp_path / "two/prototypes.png") as prototypes:
        assert prototypes.width == 2 + 10 * 34
    without = run(script, tmp_path / "plain", *options, "--workers", 0, "--focal-views", 0)
    assert without[1][-1]["loss"] != log[-1]["loss"]


@siamese
def test_the_encoder_of_a_checkpoint_is_the_targets(script, tmp_path):
    state, _ = run(script, tmp_path, "--steps", 7)
    different = 0
    for name, weight in state["encoder"].items():
        assert torch.equal(weight, state["target"][f"encoder.{name}"])
        different += not torch.equal(weight, state["msn"][f"encoder.{name}"])
    assert different > 20


@siamese
def test_timm_takes_the_encoder_of_a_checkpoint(script, tmp_path):
    import timm  # slow

    state, _ = run(script, tmp_path, "--steps", 2, "--stem", "--batch-size", 16)
    options = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    theirs = timm.create_model("vit_tiny_patch16_224", **options)
    theirs.load_state_dict(state["encoder"])
    mine = script.VisionTransformer(32, 8, 16, 1, 2)
    mine.load_state_dict(state["encoder"])
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert expected.std() > 0.1
        torch.testing.assert_close(mine.eval()(images), expected, rtol=0, atol=1e-5)


@siamese
def test_the_papers_encoder_has_timms_names_and_shapes(script):
    import timm  # slow

    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0)
        mine = script.VisionTransformer(224, 16, 768, 12, 12)
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in (mine, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 150


# ---- 2. SimCLR and VICReg


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_takes_the_encoder(arch, pictures, tmp_path):
    options = "--data", pictures, "--recipe", "paper", "--arch", arch, "--image-size", 48
    options += "--batch-size", 4, "--steps", 2, "--workers", 0
    state, _ = run(simclr, tmp_path, *options)
    theirs = getattr(models, arch)()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(state["encoder"])
    mine, dim = simclr.resnet(arch, 48)
    mine.load_state_dict(state["encoder"])
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert expected.shape == (2, dim) and expected.std() > 0.01
        torch.testing.assert_close(mine.eval()(images), expected, rtol=1e-5, atol=1e-5)


@convolutional
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_residual_branches_start_at_zero_and_small_images_keep_their_size(script, arch):
    network, _ = script.resnet(arch, 32)
    blocks = [m for m in network.modules() if hasattr(m, "downsample")]
    assert len(blocks) == {"resnet18": 8, "resnet50": 16}[arch]
    for block in blocks:
        last = block.bn2 if arch == "resnet18" else block.bn3
        assert not last.weight.any() and block.bn1.weight.all()
    sizes = []
    network.layer1.register_forward_hook(lambda *x: sizes.append(tuple(x[1][0].shape[2:])))
    network(torch.rand(2, 3, 32, 32))
    assert sizes == [(32, 32)]
    names = [name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert not names  # all are over the processes


@pytest.mark.parametrize("alike", [True, False])
def test_simclrs_spread_is_0_for_equal_embeddings_and_defined_for_one_image(alike):
    z = torch.ones(4, 2) if alike else torch.eye(2).repeat(2, 1)
    network = nn.Linear(2, 2, bias=False)
    nn.init.eye_(network.weight)
    optimizer = simclr.LARS(network.parameters(), 0.0, 0.0)
    args = types.SimpleNamespace(bf16=False, temperature=0.1)
    spread = simclr.simclr_step(network, optimizer, z, 0.1, args)["embedding_std"]
    assert spread.item() == pytest.approx(0 if alike else 0.5**0.5, abs=1e-3)
    spread = simclr.simclr_step(network, optimizer, z[::2], 0.1, args)["embedding_std"]
    assert spread.isfinite()


def test_a_term_of_vicreg_can_be_switched_off(tmp_path):
    _, log = run(vicreg, tmp_path, "--steps", 2, "--sim-coeff", 0, "--std-coeff", 0)
    coefficient = vicreg.parse_args([]).cov_coeff
    for line in log:
        assert line["loss"] == pytest.approx(coefficient * line["covariance"], rel=1e-5)
        assert line["invariance"] > 0


def test_the_views_of_vicreg_have_probabilities_of_their_own(tmp_path, monkeypatch):
    seen = []
    photometry = vicreg.photometry

    def spy(views, u, jitter, grey, blur, blur_sigma, solarise, threshold):
        seen.append((blur, solarise, threshold))
        return photometry(views, u, jitter, grey, blur, blur_sigma, solarise, threshold)

    monkeypatch.setattr(vicreg, "photometry", spy)
    options = "--blur", 1.0, 0.1, "--solarise", 0.0, 0.2, "--threshold", 0.5
    run(vicreg, tmp_path, *options, "--steps", 1)
    assert seen == [(1.0, 0.0, 0.5), (0.1, 0.2, 0.5)]


# ---- 3. MAE and data2vec


@pytest.fixture
def one_plate_of_each_class(monkeypatch):
    plates = sampler.draw_plates(1, 0)
    monkeypatch.setattr(sampler, "draw_plates", lambda per_class, seed: plates)


def assert_evaluates(folder):
    linear_eval.main([str(folder / "checkpoint.pt"), "--epochs", "1"])
    report = json.loads((folder / "linear_eval_plates_digits.json").read_text())
    assert 0 < report["top1"] < 100 and report["best"]["feature"] in ("cls", "cls4", "patches")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_reconstruction_of_a_perfect_prediction_is_the_image(norm_pix_loss, tmp_path):
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


def test_maes_checkpoints_evaluate_and_load_in_timm(tmp_path, one_plate_of_each_class):
    import timm  # slow

    assert not mae.parse_args(["--no-norm-pix-loss"]).norm_pix_loss
    state, _ = run(mae, tmp_path, "--steps", 2)
    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    theirs = timm.models.VisionTransformer(**sizes).eval()
    theirs.load_state_dict(state["encoder"])
    encoder = linear_eval.load_encoder(tmp_path / "checkpoint.pt")
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), theirs(images), rtol=1e-5, atol=1e-5)
        whole = mae.MAE(32, 8, 16, 1, 2, 8, 1, 1)
        whole.load_state_dict(state["mae"])
        every = torch.arange(16).expand(3, -1)
        torch.testing.assert_close(whole.encode(images, every)[:, 0], encoder(images))
    control = linear_eval.untrained(encoder)
    assert torch.equal(control.pos_embed, encoder.pos_embed)  # fixed, so the control has it
    bound = (6 / (16 + 48)) ** 0.5
    assert 0.9 * bound < control.blocks[0].attn["qkv"].weight.abs().max() <= bound
    assert_evaluates(tmp_path)


def test_data2vecs_target_is_evaluated_and_moves_slower_than_the_anchor(tmp_path):
    options = "--warmup", 0.001, "--ema", 0.9, 0.9, "--lr", 0.01
    first, _ = run(data2vec, tmp_path, "--steps", 1, *options)  # the first update's rate is 0
    last, _ = run(data2vec, tmp_path, "--steps", 2, *options)
    for name, before in first["target"].items():
        moved = last["anchor"][name] - first["anchor"][name]
        expected = before + 0.1 * moved
        torch.testing.assert_close(last["target"][name], expected, rtol=1e-5, atol=1e-6)
    weight = last["encoder"]["norm.weight"]
    assert torch.equal(weight, last["target"]["encoder.norm.weight"])
    assert not torch.equal(weight, last["anchor"]["encoder.norm.weight"])


def test_data2vecs_checkpoints_evaluate_and_load_in_timm(tmp_path, one_plate_of_each_class):
    import timm  # slow

    state, _ = run(data2vec, tmp_path, "--steps", 2)
    options = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    options |= dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1)
    theirs = timm.models.beit.Beit(**options, global_pool="token").eval()
    theirs.load_state_dict(state["encoder"])
    encoder = linear_eval.load_encoder(tmp_path / "checkpoint.pt")
    pixels = (torch.rand(3, 3, 32, 32) * 255).round().byte()
    found = linear_eval.features(encoder, pixels)
    with torch.no_grad():
        x = data2vec.normalise(pixels.float() / 255, standardise=True)
        tokens = theirs.forward_features(x)
    torch.testing.assert_close(found["cls"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["patches"], tokens[:, 1:].mean(dim=1), rtol=1e-5, atol=1e-5)
    assert_evaluates(tmp_path)
