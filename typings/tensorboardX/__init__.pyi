# What scanloom uses of tensorboardX, whose protocol buffers are classes made when imported.
