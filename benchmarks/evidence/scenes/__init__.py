"""Cut-outs on photographs: a harder task beside the digits, with a pretrained tower."""
