"""What a step sees: tasks, images and labels, the instance memory, paste augmentation."""
