import pytest
import torch
from timm.models.resnet import BasicBlock
from torch import nn

from pneumo.model.folded import FoldedUNet, _FoldedBasicBlock
from pneumo.model.unet import UNet, features

NARROW = (16, 8, 8, 8, 4)


def trained(encoder: str, seed: int = 0) -> UNet:
    """A network whose batch norms are none of them the identity."""
    torch.manual_seed(seed)
    model = UNet(encoder, decoder_channels=NARROW)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.to(memory_format=torch.channels_last).eval()


@pytest.mark.parametrize(
    "encoder",
    ["resnet18", "seresnet18", "resnetblur18", "mobilenetv3_small_050", "tf_efficientnet_lite0", "test_convnext"],
)
def test_the_logits_stay_the_same(encoder):
    model = trained(encoder).double()
    folded = FoldedUNet(model, torch.float64)
    norms = [module for module in folded.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert not norms
    image = torch.rand(2, 1, 64, 96, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(image), model(image), rtol=1e-10, atol=1e-10)


def test_float32_and_bf16_are_as_near_as_the_network_itself():
    model = trained("resnet18")
    image = torch.rand(2, 1, 64, 64)
    with torch.inference_mode():
        exact = model.double()(image.double())
        model.float()
        for dtype in (torch.float32, torch.bfloat16):
            folded = FoldedUNet(model, dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                errors = [float((net(image).double() - exact).abs().mean()) for net in (folded, model)]
            assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "ghostnet_050"])
def test_it_can_be_filled_again(encoder):
    """Also where convolutions have no batch norm after them, or keep it."""
    first, second = trained(encoder, 0), trained(encoder, 1)
    image = torch.rand(1, 1, 64, 64)
    folded, fresh = FoldedUNet(first, torch.float32), FoldedUNet(second, torch.float32)
    before = folded(image)
    folded.fill(second)
    assert torch.equal(folded(image), fresh(image))
    assert not torch.equal(before, folded(image))


def test_the_network_itself_is_left_alone():
    model = trained("resnet18").train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    FoldedUNet(model, torch.bfloat16)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_residual_blocks_are_replaced_where_they_are_plain():
    def count(name: str) -> tuple[int, int]:
        folded = FoldedUNet(trained(name), torch.float32)
        kinds = [type(module) for module in folded.encoder.modules()]
        return kinds.count(_FoldedBasicBlock), kinds.count(BasicBlock)

    assert count("resnet18") == (8, 0)
    assert count("resnetblur18") == (5, 3)  # three blur between their convolutions


@pytest.mark.parametrize("encoder", ["regnetv_040", "ghostnet_050"])
def test_a_convolution_whose_own_result_is_a_feature_keeps_its_batch_norm(encoder):
    model = trained(encoder)
    image = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        wanted, found = model.double()(image.double()), FoldedUNet(model.float(), torch.float32)(image)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_first_relu_that_is_done_with_the_convolution_is_not_done_again():
    folded = FoldedUNet(trained("resnet18"), torch.float32)
    assert folded.clipped and type(folded.encoder.act1) is nn.Identity
    image = torch.rand(1, 1, 64, 64)
    assert float(features(folded, image, relu=True)[0].min()) == 0
    assert not FoldedUNet(trained("resnet26d"), torch.float32).clipped  # three convolutions and ReLUs at first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu_as_on_the_cpu():
    model = trained("resnet34")
    image = torch.rand(2, 1, 128, 128)
    with torch.inference_mode():
        exact = model.double()(image.double())
        folded = FoldedUNet(model.float().cuda(), torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16):
            found, plain = (net(image.cuda()).float().cpu().double() for net in (folded, model))
    assert float((found - exact).abs().mean()) <= 2 * float((plain - exact).abs().mean())
