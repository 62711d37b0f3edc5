"""From unlabelled images you get an encoder whose features know what the images show. Contrastive learning gets there by telling every image from every other one, and so it also pushes apart images that mean the same: *false negatives*. This package teaches how to find and remove them, in notebooks that run on a laptop. The same notebooks are a fastai library that trains on your folder of images.

Modules:

- `ifnd_nb.banks`: Embeddings that training computed anyway, kept for the next detection
- `ifnd_nb.cli`: What can be said in the shell, and what it answers
- `ifnd_nb.clustering`: Pseudo labels of all images at several levels, whatever the embeddings are like
- `ifnd_nb.compiled`: On a GPU, loss and masks in one kernel each way
- `ifnd_nb.config`: All that a run is told: names, defaults, help and limits, once
- `ifnd_nb.contrast`: The baseline: learn to see by telling every image from every other image
- `ifnd_nb.detect`: Which negatives mean the same as the anchor? Clusters of the embedding tell, without any label
- `ifnd_nb.detectors`: Which keys of the queue are false negatives of which anchor?
- `ifnd_nb.drawings`: Eight drawings of the method, as the lessons show them
- `ifnd_nb.draws`: Random numbers that depend on nothing but the seed, the epoch and the image
- `ifnd_nb.embedding`: Row i belongs to image i, and embedding changes neither encoder nor random numbers
- `ifnd_nb.encoders`: A body that makes features of images, and the head that the loss sees
- `ifnd_nb.evaluate`: Is the representation any good, and better than no training at all?
- `ifnd_nb.experiments`: Many runs in one file: what all comparisons run with
- `ifnd_nb.features`: An encoder outside this package: as a file of features, or as weights for torchvision and timm
- `ifnd_nb.files`: Files that are whole or not there
- `ifnd_nb.folders`: What a folder of images holds, and what of it is left out
- `ifnd_nb.galleries`: What was found and removed, as pictures
- `ifnd_nb.glyphs`: As many concepts as you like: rendered characters
- `ifnd_nb.habits`: A folder of your own, and what you know of fastai
- `ifnd_nb.ifnd`: The callback that detects at the start of an epoch and removes in each batch
- `ifnd_nb.images`: Any image file as numbers, and a collection of images by their index
- `ifnd_nb.kmeans`: Spherical k-means, on any device and in any number of processes
- `ifnd_nb.labels`: Names and numbers of any kind, as positions in a sorted list
- `ifnd_nb.levels`: How many clusters there are, whether there are any yet, and which pairs six clusterings agree on
- `ifnd_nb.loaders`: Any collection of images, as batches of two random views and the index of the image
- `ifnd_nb.loggers`: The epochs of a run, logged elsewhere too
- `ifnd_nb.matrices`: Two random pictures of the same image: how they are made, and what they teach
- `ifnd_nb.moco`: The baseline as a fastai `Learner`: both encoders, the queue, the callback
- `ifnd_nb.one_pass`: The losses of removal with gradients written by hand, so that one exponential serves all levels
- `ifnd_nb.optimiser`: fastai's Adam in one call for all parameters
- `ifnd_nb.pairs`: Votes of several clusterings, the pairs of a batch, and what becomes of clusters in time
- `ifnd_nb.pictures`: Grids of images, and an embedding on paper
- `ifnd_nb.precision`: Where networks are faster in half the precision, and where they are not
- `ifnd_nb.probes`: A linear probe asks whether the class is there in a simple form; clusters ask whether it can be found without labels
- `ifnd_nb.processes`: Several processes that train as one would
- `ifnd_nb.reading`: Arrays, files and data sets, read into memory or on demand
- `ifnd_nb.registry`: What can be chosen by name, and where each name is written
- `ifnd_nb.removal`: Two ways to remove false negatives from the loss: leave them out, or make them positives. A third way does both
- `ifnd_nb.replays`: On a GPU, networks and views are recorded once and then replayed, each in one launch
- `ifnd_nb.report`: One table and one picture: is it better than raw pixels, than no training, and than the baseline, and why?
- `ifnd_nb.rivals`: Other ways to handle false negatives, on the same queue and in the same loop
- `ifnd_nb.runs`: What a run leaves on disk, whole at any moment, and how it goes on from there
- `ifnd_nb.scoring`: One table beside raw pixels and the untrained encoder, and columns in the training loop
- `ifnd_nb.sources`: One function for any collection of images
- `ifnd_nb.splits`: Which images are trained on, and which are held out to score
- `ifnd_nb.start`: Everything that can go wrong before training, said before training
- `ifnd_nb.training`: From a folder of unlabelled images to a trained encoder: a run, from its arguments to its scores
- `ifnd_nb.views`: Crop, colour and blur of both views of all images of a batch, in a few matrix products
- `ifnd_nb.weights`: The encoder of a run as a file, and weights from elsewhere"""

__version__ = "0.0.1"
