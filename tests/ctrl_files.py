"""Files in the layouts that CTRL's authors have published, made here."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """One of the three, as the paper's code names its parts, with batch norm as it was trained."""

    def __init__(self, narrow, wide, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x):
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class Network(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = Block(3, 64, 1), Block(64, 128, 2), Block(128, 256, 2)
        self.fc = nn.Linear(256, logits)

    def forward(self, x):
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def residual(logits):
    """A network whose batch norms have seen something, in evaluation."""
    torch.manual_seed(0)
    network = Network(logits)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.eval().requires_grad_(False)


def write_classifier(path, network, temperature, state=None):
    scaler = {"temperature": torch.tensor([temperature])}
    torch.save({"model_state_dict": state or network.state_dict(), "scaler": scaler}, path)
    return str(path)
