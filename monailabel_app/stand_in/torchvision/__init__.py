"""Stand-in for torchvision where its build does not fit that of torch: MONAI Label needs two functions of it at import."""
