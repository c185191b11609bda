import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from pneumo.engine import RunningStatistics
from pneumo.errors import DataError, UsageError
from pneumo.kernels import wide_conv, winograd
from pneumo.kernels.wide_conv import weight_gradient
from pneumo.kernels.winograd import winograd_conv
from pneumo.model import unet
from pneumo.model.folded import FoldedUNet
from pneumo.model.unet import UNet

NARROW = (16, 8, 8, 8, 4)


@pytest.fixture(scope="module")
def resnet() -> UNet:
    torch.manual_seed(0)
    return UNet("resnet34").eval()


class Encoder(nn.Module):
    """The first convolution of an encoder, used as `way` says."""

    def __init__(self, way) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(3, 3, 3, padding=1), way

    def forward(self, image):
        return [self.way(self.conv, image)]


@pytest.mark.parametrize(
    ("way", "taken"),
    [
        (lambda conv, image: conv(image).relu(), True),
        (lambda conv, image: conv(image + 1), False),
        (lambda conv, image: conv(conv(image)), False),
        (lambda conv, image: conv(image) + image, False),
        (lambda conv, image: torch.cat([conv(image), image[:, :2]], dim=1).view(1, 5, 64, 64), False),
        (lambda conv, image: conv(image) @ image.view(3, 64, 64)[0], False),
    ],
)
def test_a_first_convolution_is_taken_out_only_where_nothing_else_needs_the_image(way, taken):
    encoder = Encoder(way).train()
    conv, image = encoder.conv, torch.rand(1, 3, 64, 64)
    wanted = encoder(image)[0]
    assert unet._take_stem(encoder) == ("conv" if taken else None)
    assert encoder.training and encoder.conv.weight is conv.weight
    assert type(encoder.conv) is (unet.Stem if taken else nn.Conv2d)
    assert torch.equal(encoder(conv(image) if taken else image)[0], wanted)


def test_first_convolutions_of_encoders():
    found = {
        name: UNet(name, decoder_channels=NARROW).stem for name in ("resnet18", "tf_efficientnet_lite0", "resnet26d")
    }
    assert found == {"resnet18": "conv1", "tf_efficientnet_lite0": None, "resnet26d": "conv1.0"}


def test_size_and_shape(resnet):
    assert sum(p.numel() for p in resnet.parameters()) == 24_436_369
    assert resnet(torch.rand(2, 1, 64, 96)).shape == (2, 1, 64, 96)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(2, 1, 64, 64, dtype=torch.uint8),
        torch.zeros(2, 3, 64, 64),
        torch.zeros(2, 1, 64, 100),
        torch.zeros(2, 1, 100, 64),
        torch.zeros(1, 64, 64),
    ],
)
def test_another_image_than_it_takes_is_named(resnet, image):
    for net in (resnet, FoldedUNet(resnet, torch.float32)):
        with pytest.raises(ValueError, match=r"images must be \(B, 1, H, W\) float .* 32, got \(.*\) torch\."):
            net(image)


def test_normalization_is_the_encoders_own(resnet):
    assert resnet.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert resnet.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    lite = UNet("tf_efficientnet_lite0", decoder_channels=NARROW)
    assert lite.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert "mean" in lite.state_dict()  # a checkpoint carries it


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv3_small_050", "tf_efficientnet_lite0", "test_convnext"])
def test_any_encoder_with_features_from_a_half_or_a_quarter_on(encoder):
    model = UNet(encoder, decoder_channels=NARROW)
    assert [block.conv1[0].in_channels > block.below for block in model.blocks] == [
        *(True, True, True, encoder != "test_convnext", False)
    ]
    logits = model(torch.rand(2, 1, 64, 64))
    assert logits.shape == (2, 1, 64, 64)
    logits.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def trained_once(model: UNet) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients and running statistics after one pass, and the bytes kept for the backward pass, each memory once."""
    running = RunningStatistics(model)
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    running.before_forward()
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(image).square().mean()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    loss.backward()
    found = {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    bytes_kept = sum(size for place, size in kept.items() if place not in weights)
    return found | {"statistics": running.captured()}, bytes_kept


def test_checkpointing_keeps_less_and_changes_nothing():
    torch.manual_seed(0)
    plain = UNet("resnet18", decoder_channels=(32, 32, 16, 16, 8))
    lean = UNet("resnet18", decoder_channels=(32, 32, 16, 16, 8), checkpointing=True)
    lean.load_state_dict(plain.state_dict())
    (wanted, whole), (found, part) = trained_once(plain), trained_once(lean)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)  # running statistics as well
    assert part < 0.5 * whole


def test_both_forms_of_a_block_give_the_same_network():
    torch.manual_seed(0)
    model = UNet("resnet18", decoder_channels=NARROW).double()
    image, logits = torch.rand(2, 1, 64, 64, dtype=torch.float64), []
    for merged in (True, False):
        for block in model.blocks:
            block.merged = merged
        logits.append(model(image))
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
    shapes = model.block_shapes(2, 64)
    assert shapes[0] == ((2, 512, 2, 2), 256, 16) and shapes[-1] == ((2, 8, 32, 32), 0, 4)


def test_convolutions_of_many_channels_in_their_faster_form(resnet, monkeypatch):
    """In float32 on a CPU: 7 and 11 of the encoder, two each in the first two blocks; of the folded network as well."""
    image = torch.rand(2, 1, 256, 256)
    used = []
    for home in (False, True):
        monkeypatch.setattr(winograd, "mkl_is_at_home", lambda home=home: home)
        monkeypatch.setattr(winograd, "winograd_conv", lambda *given: used[-1].append(1) or winograd_conv(*given))
        used.append([])
        logits = resnet(image)
        slopes = torch.autograd.grad(logits.square().mean(), list(resnet.parameters()))
        folded, logits = FoldedUNet(resnet, torch.float32)(image), logits.detach()
        torch.testing.assert_close(folded, logits, rtol=0, atol=1e-4 * float(logits.abs().max()))
        used[-1] = len(used[-1]), logits, torch.cat([slope.flatten() for slope in slopes])
    (none, plain, wanted), (many, found, near) = used
    assert (none, many) == (0, 2 * (7 + 11 + 2 * 2))
    assert not torch.equal(plain, found)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-5 * float(plain.abs().max()))
    assert float((near - wanted).norm() / wanted.norm()) < 3e-5


def test_gradients_of_many_weights_over_few_pixels_as_products(resnet, monkeypatch):
    """Of two images of 128 px: in the encoder's last levels 12 and 6, no shortcut as in bf16; in two blocks 3 and 1."""
    image, made = torch.rand(2, 1, 128, 128), []
    monkeypatch.setattr(winograd, "mkl_is_at_home", lambda: False)
    monkeypatch.setattr(wide_conv, "weight_gradient", lambda *given: made.append(given) or weight_gradient(*given))
    slopes = []
    for pairs in (wide_conv.PAIRS, 10**9):
        monkeypatch.setattr(wide_conv, "PAIRS", pairs)
        slopes.append(torch.autograd.grad(resnet(image).square().mean(), list(resnet.parameters())))
    assert len(made) == 12 + 6 + 3 + 1
    found, wanted = (torch.cat([slope.flatten() for slope in some]) for some in slopes)
    assert not torch.equal(found, wanted)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({"padding": 1}, True),
        ({"padding": 1, "bias": False}, True),
        ({"padding": 1, "padding_mode": "reflect"}, False),
        ({"padding": 1, "dilation": 2}, False),
        ({"padding": 1, "stride": 2}, True),
        ({"padding": 1, "stride": 3}, False),
        ({"padding": 1, "stride": (1, 2)}, False),
        ({"kernel_size": 1}, True),
        ({"kernel_size": 1, "stride": 2}, True),
        ({"kernel_size": 1, "padding": 1}, False),
        ({"padding": 1, "groups": 2}, False),
        ({"padding": 0}, False),
        ({"padding": 1, "kernel_size": 5}, False),
    ],
)
def test_which_convolutions_are_plain(settings, plain):
    assert unet._is_plain(nn.Conv2d(4, 4, **{"kernel_size": 3, **settings})) is plain


def smp_forward(state: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """That library's Unet("resnet34") in evaluation, written with plain functions from its state dict alone."""
    from torch.nn import functional as F

    def bn(x, name):
        return F.batch_norm(x, *(state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image.repeat(1, 3, 1, 1) - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    x = bn(conv(x, "encoder.conv1", stride=2, padding=3), "encoder.bn1").relu()
    features = [x]
    x = F.max_pool2d(x, 3, 2, 1)
    for layer, blocks in enumerate([3, 4, 6, 3], start=1):
        for block in range(blocks):
            name = f"encoder.layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = bn(conv(x, f"{name}.conv1", stride=stride, padding=1), f"{name}.bn1").relu()
            y = bn(conv(y, f"{name}.conv2", padding=1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in state:
                x = bn(conv(x, f"{name}.downsample.0", stride=stride), f"{name}.downsample.1")
            x = (x + y).relu()
        features.append(x)
    *skips, x = features
    for block, skip in enumerate([*reversed(skips), None]):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = x if skip is None else torch.cat([x, skip], dim=1)
        for number in (1, 2):
            name = f"decoder.blocks.{block}.conv{number}"
            x = bn(conv(x, f"{name}.0", padding=1), f"{name}.1").relu()
    return conv(x, "segmentation_head.0", padding=1)


def smp_state(model: UNet) -> dict[str, torch.Tensor]:
    """A state dict with that library's keys and random weights and statistics."""
    torch.manual_seed(1)
    renamed = {}
    for key, tensor in model.state_dict().items():
        key = key.replace("blocks.", "decoder.blocks.").replace("head.", "segmentation_head.0.")
        if key in ("mean", "std"):
            continue
        if key.endswith("running_var"):
            renamed[key] = torch.rand_like(tensor) + 0.5
        elif tensor.is_floating_point():
            renamed[key] = tensor + 0.02 * torch.randn_like(tensor)
        else:
            renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("form", ["state dict", "file of Lightning"])
def test_a_checkpoint_of_segmentation_models_pytorch_gives_the_same_logits(resnet, tmp_path, form):
    state = smp_state(resnet)
    mine = UNet("resnet34").eval()
    leftovers = {"encoder.fc.weight": torch.zeros(1000, 512), "encoder.fc.bias": torch.zeros(1000)}
    if form == "state dict":
        unet.load_smp(mine, {f"module.{key}": tensor for key, tensor in {**state, **leftovers}.items()})
    else:
        module = {"mean": torch.zeros(1, 3, 1, 1), **{f"model.{key}": tensor for key, tensor in state.items()}}
        torch.save({"epoch": 3, "state_dict": module}, tmp_path / "smp.ckpt")
        unet.load_smp(mine, unet.read_weights(tmp_path / "smp.ckpt"))
    image = torch.rand(2, 1, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(mine(image), smp_forward(state, image), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.blocks.0.conv1.0.weight"), "1 missing, as blocks.0.conv1.0.weight"),
        (lambda s: s.update({"decoder.extra": torch.zeros(1)}), "1 unknown, as decoder.extra"),
        (
            lambda s: s.update({"segmentation_head.0.bias": torch.zeros(2)}),
            r"1 of another shape, as head.bias of \[2\], not \[1\]$",
        ),
    ],
)
def test_another_checkpoint_is_refused(resnet, change, message):
    state = smp_state(resnet)
    change(state)
    with pytest.raises(DataError, match=message):
        unet.load_smp(UNet("resnet34"), state)


def test_encoder_weights_from_a_local_file(tmp_path):
    torch.manual_seed(3)
    whole = timm.create_model("resnet18", pretrained=False)
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        model = UNet("resnet18", str(tmp_path / name), NARROW)
        for key, tensor in model.encoder.state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[key]), key


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "module.backbone."])
def test_what_a_module_around_an_encoder_puts_before_its_names_is_left_out(tmp_path, prefix):
    whole = timm.create_model("resnet18", pretrained=False)
    state = {f"{prefix}{key}": tensor for key, tensor in whole.state_dict().items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "w.pth")
    model = UNet("resnet18", str(tmp_path / "w.pth"), NARROW)
    assert torch.equal(model.encoder.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)
    state.pop(f"{prefix}layer1.0.bn1.weight")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"resnet18: 1 missing, as layer1\.0\.bn1\.weight$"):
        UNet("resnet18", str(tmp_path / "w.pth"), NARROW)


def test_a_prefix_that_is_an_encoders_own_stays():
    state = {"stages.a": torch.zeros(1), "stages.b": torch.zeros(1)}
    assert unet._without_prefix(state, ["stages.a", "stages.b", "head.c"]) is state
    assert list(unet._without_prefix(state, ["a", "b"])) == ["a", "b"]
    assert unet._without_prefix({}, ["a"]) == {}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "net."])
def test_training_starts_from_the_encoder_of_an_smp_unet(resnet, tmp_path, prefix):
    state = smp_state(resnet)
    outer = {"mean": torch.zeros(1, 3, 1, 1), **{f"{prefix}{key}": tensor for key, tensor in state.items()}}
    torch.save({"epoch": 3, "state_dict": outer}, tmp_path / "smp.pth")
    model = UNet("resnet34", str(tmp_path / "smp.pth"))
    for key, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, state[f"encoder.{key}"]), key
    assert "state_dict" not in model.encoder.pretrained_cfg


def test_the_encoder_of_an_smp_unet_over_timm(tmp_path):
    whole = timm.create_model("resnet18", pretrained=False)
    state = {f"encoder.model.{key}": tensor for key, tensor in whole.state_dict().items() if not key.startswith("fc.")}
    torch.save({**state, "segmentation_head.0.bias": torch.zeros(1)}, tmp_path / "smp.pth")
    model = UNet("resnet18", str(tmp_path / "smp.pth"), NARROW)
    assert torch.equal(model.encoder.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)


@pytest.mark.slow  # which run where the library is
@pytest.mark.parametrize("encoder", ["resnet18", "test_convnext"])
def test_the_library_itself_gives_the_same_logits_with_encoders_of_timm(encoder, tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    theirs, mine = smp.Unet(f"tu-{encoder}", encoder_weights=None).eval(), UNet(encoder).eval()
    for buffer in theirs.buffers():  # running statistics that are none of them the first
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    unet.load_smp(mine, theirs.state_dict())
    image = torch.rand(2, 1, 64, 96)
    with torch.inference_mode():
        wanted = theirs((image.expand(-1, 3, -1, -1) - mine.mean) / mine.std)
        torch.testing.assert_close(mine(image), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    torch.save(theirs.state_dict(), tmp_path / "smp.pth")
    for key, tensor in UNet(encoder, str(tmp_path / "smp.pth"), NARROW).encoder.state_dict().items():
        assert torch.equal(tensor, mine.encoder.state_dict()[key]), key


def test_weights_of_a_whole_model_whose_features_have_other_names(tmp_path):
    whole = timm.create_model("test_convnext", pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    model = UNet("test_convnext", str(tmp_path / "w.pth"), NARROW)
    assert torch.equal(model.encoder.stages_3.downsample[1].weight, whole.stages[3].downsample[1].weight)
    assert torch.equal(model.encoder.stem_0.weight, whole.stem[0].weight)


def test_a_first_convolution_of_one_channel_is_explained(tmp_path):
    state = timm.create_model("resnet18", in_chans=1, pretrained=False).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        DataError,
        match=r"conv1\.weight of \[64, 1, 7, 7\], not \[64, 3, 7, 7\]\. Its first convolution takes one channel; here",
    ):
        UNet("resnet18", str(tmp_path / "w.pth"), NARROW)


def test_a_pickled_model_is_to_be_saved_as_a_state_dict(tmp_path):
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "w.pth")
    with pytest.raises(
        DataError,
        match=r"asks for code \(torch.nn\S+Conv2d\), .* save its weights alone: torch\.save\(model\.state_dict\(\)",
    ):
        UNet("resnet18", str(tmp_path / "w.pth"), NARROW)


def test_weights_that_are_not_finite_are_named(tmp_path):
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"w\.pth: layer1\.0\.conv1\.weight is not finite"):
        UNet("resnet18", str(tmp_path / "w.pth"), NARROW)


def test_a_network_without_its_record_is_refused(tmp_path):
    torch.save(UNet("resnet18", decoder_channels=NARROW).state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"w\.pth holds a whole network of this program, without .* as best\.pt$"):
        UNet("resnet18", str(tmp_path / "w.pth"), NARROW)
    with pytest.raises(UsageError, match=r" is a folder; name the file in it$"):
        UNet("resnet18", str(tmp_path), NARROW)


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"does not hold the weights of resnet34: \d+ missing"):
        UNet("resnet34", str(tmp_path / "w.pth"))


def test_a_missing_key_is_not_filled_with_random_numbers(tmp_path):
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    del state["layer3.0.conv1.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"1 missing, as layer3\.0\.conv1\.weight"):
        UNet("resnet18", str(tmp_path / "w.pth"), NARROW)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"", b"version https://git-lfs.github.com/spec/v1"])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_is_no_weights_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        UNet("resnet18", str(tmp_path / name), NARROW)


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"no file /no/such/w\.pth"):
        UNet("resnet18", "/no/such/w.pth", NARROW)


def test_offline_without_a_file_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"model\.pretrained=FILE"):
        UNet("resnet26d", pretrained=True)


def test_other_encoders_are_refused():
    for name in ("resnet34x", "ResNet34"):
        with pytest.raises(UsageError, match=rf"timm knows no '{name}'\. Did you mean resnet34 or \w+ or \w+\?$"):
            UNet(name)
    with pytest.raises(UsageError, match=r"knows no 'qqqqqq'\.$"):
        UNet("qqqqqq")
    with pytest.raises(UsageError, match=r"features at \[16, 16, 16\]"):
        UNet("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("botnet26t_256", r"takes no images of 64 px .*choose one for images of any size, as resnet34"),
        ("legacy_xception", r"makes features of \[29, 15, 8, 4, 2\] px of an image of 64; the decoder needs \[32, 16"),
    ],
)
def test_an_encoder_whose_features_do_not_fit_is_refused(encoder, message):
    with pytest.raises(UsageError, match=rf"^model\.encoder: {encoder} {message}"):
        UNet(encoder, decoder_channels=NARROW)


def test_real_pretrained_weights(siim):
    path = siim.parents[1] / "weights" / "tf_efficientnet_lite0.safetensors"
    model = UNet("tf_efficientnet_lite0", str(path), NARROW)
    stored = safetensors.torch.load_file(path)
    assert torch.equal(model.encoder.conv_stem.weight, stored["conv_stem.weight"].float())


def test_the_image_of_an_encoder_that_keeps_its_first_convolution_is_normalized_as_well():
    model = UNet("tf_efficientnet_lite0", decoder_channels=NARROW).eval()
    assert model.stem is None
    image = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        wanted = model.encoder((image.expand(1, 3, 64, 64) - 0.5) / 0.5)
        for one, other in zip(unet.features(model, image), wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_a_first_convolution_that_pads_otherwise_is_left_where_it_is():
    encoder = Encoder(lambda conv, image: conv(image).relu())
    encoder.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    assert unet._take_stem(encoder) is None


def test_what_other_versions_leave_in_a_checkpoint_of_smp(resnet):
    """A head for classification is left out, and counters that older PyTorch did not keep may be missing."""
    state = {key: tensor for key, tensor in smp_state(resnet).items() if not key.endswith("num_batches_tracked")}
    mine = UNet("resnet34")
    unet.load_smp(mine, {**state, "classification_head.3.weight": torch.zeros(1, 512)})
    assert torch.equal(mine.head.bias, state["segmentation_head.0.bias"])


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_weights_are_unwrapped(tmp_path, wrapper):
    torch.save({"epoch": 3, wrapper: {"w": torch.ones(2)}}, tmp_path / "w.pth")
    assert torch.equal(unet.read_weights(tmp_path / "w.pth")["w"], torch.ones(2))
    torch.save({wrapper: {"w": torch.ones(2), "seed": 3}}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"w\.pth holds no state dict of tensors$"):
        unet.read_weights(tmp_path / "w.pth")


def test_an_encoder_that_cannot_compute_again_is_named():
    with pytest.raises(
        UsageError, match=r"^model\.checkpointing: timm does not offer it for hrnet_w18_small\. Set it to"
    ):
        UNet("hrnet_w18_small", decoder_channels=NARROW, checkpointing=True)


def test_what_a_decoder_begins_with():
    """He's and Glorot's uniform weights, and no opinion: at first every pixel is as likely as not."""
    torch.manual_seed(0)
    model = UNet("test_resnet")
    for conv in (module for module in model.blocks.modules() if isinstance(module, nn.Conv2d)):
        bound = (6 / conv.weight[0].numel()) ** 0.5
        assert 0.95 * bound < float(conv.weight.detach().abs().max()) <= bound
    bound = (6 / (9 * (16 + 1))) ** 0.5
    assert 0.9 * bound < float(model.head.weight.detach().abs().max()) <= bound and not model.head.bias.any()


@pytest.mark.parametrize(
    ("endpoint", "proxies", "asked"),
    [
        ("https://huggingface.co", {}, ("huggingface.co", 443)),
        ("http://mirror", {}, ("mirror", 80)),
        ("https://mirror:8443/hub", {"http": "http://other:1"}, ("mirror", 8443)),
        ("https://huggingface.co", {"https": "http://proxy.local:3128"}, ("proxy.local", 3128)),
        ("https://huggingface.co", {"https": "proxy.local:3128"}, ("proxy.local", 3128)),
    ],
)
def test_before_timm_downloads_the_hub_or_its_proxy_is_asked_to_answer(monkeypatch, endpoint, proxies, asked):
    def connect(address, timeout):
        seen.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    seen = []
    monkeypatch.setattr(unet.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(unet.huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(unet.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(unet.urllib.request, "getproxies", lambda: proxies)
    monkeypatch.setattr(unet.socket, "create_connection", connect)
    with pytest.raises(UsageError, match=rf"{asked[0]}:{asked[1]} does not answer: Connection refused"):
        unet._from_hub("resnet18")
    monkeypatch.setattr(unet.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert unet._from_hub("resnet18") is None
    assert seen == [asked]
