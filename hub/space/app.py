"""The demo of a released model, as a Space of the Hub."""

from ride_timm.inference.demo.opinions import load_demo
from ride_timm.inference.demo.page import launch

launch(load_demo("hf-hub:ride-timm/ride_resnet32.fashion_lt"))
