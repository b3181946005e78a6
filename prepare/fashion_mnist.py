"""
FashionMNIST (Xiao et al., 1708.07747): ten classes of clothes in the format of MNIST (prepare/mnist.py), in
data/fashion_mnist.

    python -m prepare.fashion_mnist [--subset=t10k --views=8]
"""
import config
from prepare import mnist

MAKES = 'data/fashion_mnist'


def main(*arguments, **overrides):
    return mnist.main(*arguments, **overrides | dict(fashion=True))


if __name__ == '__main__':
    config.run(mnist.main, fashion=True)
